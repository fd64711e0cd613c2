"""Branches, tags and their commits."""

from typing import Any

from .messages import Refusal, Request, Response, answer_json
from .objects import Repo
from .pages import page_of, timestamp
from .state import DEFAULT_BRANCH, State


def list_refs(state: State, request: Request) -> Response:
    repo = state.repo(request)
    content: dict[str, Any] = {
        "branches": refs_below(repo, "refs/heads/"),
        "converts": [],
        "tags": refs_below(repo, "refs/tags/"),
    }
    if request.flag("include_prs"):
        content["pullRequests"] = refs_below(repo, "refs/pr/")
    return answer_json(content)


def refs_below(repo: Repo, prefix: str) -> list[dict[str, str]]:
    return [
        {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
        for ref, oid in repo.refs.items()
        if ref.startswith(prefix)
    ]


def create_branch(state: State, request: Request) -> Response:
    repo, _ = state.repo_to_write(request)
    return create_ref(state, repo, f"refs/heads/{request.args['branch']}", request.json().get("startingPoint"))


def create_tag(state: State, request: Request) -> Response:
    repo, _ = state.repo_to_write(request)
    return create_ref(state, repo, f"refs/tags/{request.json()['tag']}", request.args["revision"])


def create_ref(state: State, repo: Repo, ref: str, revision: str | None) -> Response:
    if ref in repo.refs:
        raise Refusal(409, f"Reference already exists: {ref}")
    repo.refs[ref] = state.commit_of(repo, revision or DEFAULT_BRANCH).oid
    return Response()


def delete_branch(state: State, request: Request) -> Response:
    repo, _ = state.repo_to_write(request)
    if request.args["branch"] == "main":
        raise Refusal(403, "The main branch cannot be deleted")
    return delete_ref(repo, f"refs/heads/{request.args['branch']}")


def delete_tag(state: State, request: Request) -> Response:
    repo, _ = state.repo_to_write(request)
    return delete_ref(repo, f"refs/tags/{request.args['tag']}")


def delete_ref(repo: Repo, ref: str) -> Response:
    if ref not in repo.refs:
        raise Refusal(404, f"Reference does not exist: {ref}", "RevisionNotFound")
    del repo.refs[ref]
    return Response()


def list_commits(state: State, request: Request) -> Response:
    repo = state.repo(request)
    history = repo.history(state.commit_of(repo, request.args["revision"]))
    page, headers = page_of(state, request, history, 50)
    content = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": timestamp(commit.date),
        }
        for commit in page
    ]
    return answer_json(content, headers=headers | {"X-Total-Count": str(len(history))})
