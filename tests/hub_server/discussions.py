"""Discussions and pull requests."""

from typing import Any

from .messages import Refusal, Request, Response, answer_json
from .objects import Blob, Commit, Discussion, Repo
from .pages import timestamp
from .state import DEFAULT_BRANCH, State, User


PAGE = 10


def open_discussion(repo: Repo, user: User, title: str, description: str) -> Discussion:
    """Add a discussion."""
    num = len(repo.discussions) + 1
    repo.discussions[num] = Discussion(num, title, description, user.name)
    return repo.discussions[num]


def open_pull(repo: Repo, user: User, title: str, description: str, base: str, start: Commit) -> Discussion:
    """Add a pull request to `base` whose own ref begins at `start`."""
    discussion = open_discussion(repo, user, title, description)
    discussion.base = base
    repo.refs[discussion.ref] = start.oid
    return discussion


def list_discussions(state: State, request: Request) -> Response:
    repo = state.repo(request)
    kind, status, author = (request.option(name) for name in ("type", "status", "author"))
    found = [
        discussion
        for discussion in sorted(repo.discussions.values(), key=lambda discussion: -discussion.num)
        if kind in (None, "all", "pull_request" if discussion.base else "discussion")
        and status in (None, "all", "open" if discussion.status in ("open", "draft") else "closed")
        and author in (None, discussion.author)
    ]
    start = int(request.option("p") or 0) * PAGE
    page = [summary(repo, discussion) for discussion in found[start : start + PAGE]]
    return answer_json({"count": len(found), "start": start, "discussions": page})


def create_discussion(state: State, request: Request) -> Response:
    repo, user = state.repo_to_propose(request)
    asked = request.json()
    title, description = asked["title"], asked["description"]
    if asked["pullRequest"]:
        discussion = open_pull(repo, user, title, description, DEFAULT_BRANCH, state.commit_of(repo, DEFAULT_BRANCH))
        discussion.status = "draft"
    else:
        discussion = open_discussion(repo, user, title, description)
    return answer_json(summary(repo, discussion))


def show_discussion(state: State, request: Request) -> Response:
    repo = state.repo(request)
    discussion = discussion_of(repo, request)
    event = {
        "id": f"{discussion.num:040x}",
        "type": "comment",
        "createdAt": timestamp(discussion.created_at),
        "author": {"name": discussion.author},
        "data": {
            "edited": False,
            "hidden": False,
            "latest": {"raw": discussion.description, "updatedAt": timestamp(discussion.created_at)},
            "history": [],
        },
    }
    content = summary(repo, discussion) | {"events": [event]}
    if discussion.base:
        content["changes"] = {"base": discussion.base, "mergeCommitId": discussion.merged_as}
        content["filesWithConflicts"] = [] if discussion.merged_as else sorted(merge(repo, discussion)[1])
    return answer_json(content)


def merge_pull(state: State, request: Request) -> Response:
    repo, user = state.repo_to_write(request)
    discussion = discussion_of(repo, request)
    if discussion.base is None or discussion.status not in ("open", "draft"):
        raise Refusal(400, f"Discussion {discussion.num} is not an open pull request")
    files, conflicts = merge(repo, discussion)
    if conflicts:
        raise Refusal(409, f"Both sides have changed {', '.join(sorted(conflicts))}")
    title = f"{discussion.title} (#{discussion.num})"
    merged = state.add_commit(repo, discussion.base, files, title, "", user.name)
    discussion.status, discussion.merged_as = "merged", merged.oid
    return answer_json({"success": True})


def merge(repo: Repo, pull: Discussion) -> tuple[dict[str, Blob], set[str]]:
    """The files after merging a pull request, and those that both sides have changed in different ways."""
    assert pull.base
    ours, theirs = (repo.commits[repo.refs[ref]] for ref in (pull.base, pull.ref))
    known = {commit.oid for commit in repo.history(ours)}
    common = next(commit for commit in repo.history(theirs) if commit.oid in known).files
    paths = {path for files in (common, ours.files, theirs.files) for path in files}
    changed = {path for path in paths if theirs.files.get(path) != common.get(path)}
    moved = {path for path in changed if ours.files.get(path) != common.get(path)}
    conflicts = {path for path in moved if ours.files.get(path) != theirs.files.get(path)}
    files = {path: blob for path, blob in ours.files.items() if path not in changed}
    return files | {path: theirs.files[path] for path in changed if path in theirs.files}, conflicts


def change_status(state: State, request: Request) -> Response:
    repo, _ = state.repo_to_write(request)
    discussion = discussion_of(repo, request)
    discussion.status = request.json()["status"]
    content = {
        "id": f"{discussion.num:040x}",
        "type": "status-change",
        "createdAt": timestamp(discussion.created_at),
        "author": {"name": discussion.author},
        "data": {"status": discussion.status},
    }
    return answer_json({"newStatus": content})


def discussion_of(repo: Repo, request: Request) -> Discussion:
    num = request.args["num"]
    if not num.isdigit() or int(num) not in repo.discussions:
        raise Refusal(404, f"Discussion {num} does not exist")
    return repo.discussions[int(num)]


def summary(repo: Repo, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "status": discussion.status,
        "createdAt": timestamp(discussion.created_at),
        "isPullRequest": discussion.base is not None,
        "repo": {"name": repo.id, "type": repo.type},
    }
