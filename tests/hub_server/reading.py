"""What the Hub tells: who asks, repositories, folders, files, branches, tags and commits."""

import re
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, quote

from .messages import Refusal, Request, Response, answer_json
from .repository import Blob, Commit, Repo, pointer_text, read_metadata, tags_of, tree_oids
from .state import DEFAULT_BRANCH, State, repo_type


MOST_PATHS = 1000
IDENTITY = ("_id", "id", "modelId")
# What the Hub tells of a repository in a list; asked for one, it tells more.
BRIEF = ("private", "tags", "createdAt", "downloads", "likes", "library_name", "pipeline_tag", "gated")


def whoami(state: State, request: Request) -> Response:
    user = state.signed_in(request)
    role = "write" if user.can_write else "read"
    return answer_json(
        {
            "type": "user",
            "id": user.name,
            "name": user.name,
            "fullname": user.name,
            "isPro": False,
            "orgs": [{"type": "org", "id": org, "name": org, "fullname": org} for org in user.orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }
    )


def info(state: State, request: Request) -> Response:
    repo = state.repo(request)
    commit = state.commit_of(repo, request.args.get("revision", DEFAULT_BRANCH))
    return answer_json(describe(state, repo, commit, blobs=request.flag("blobs")))


def list_repos(state: State, request: Request) -> Response:
    user = state.user(request)
    kind = repo_type(request.args)
    wanted = set(request.query.get("filter", []))
    found = []
    for repo in sorted(state.repos.values(), key=lambda repo: repo.created_at, reverse=True):
        if repo.type == kind and state.may_read(user, repo):
            description = describe(state, repo, state.commit_of(repo, DEFAULT_BRANCH))
            if wanted <= set(description["tags"]):
                found.append({key: value for key, value in description.items() if key in (*BRIEF, *IDENTITY)})
    page, headers = state.page_of(request, found, int(request.option("limit") or 1000))
    return answer_json(page, headers=headers)


def describe(state: State, repo: Repo, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    """What the API says of a repository at a commit."""
    readme = commit.files.get("README.md")
    try:
        card = read_metadata(state.read(readme).decode()) if readme else {}
    except ValueError:
        card = {}
    everything: dict[str, Any] = {
        "author": repo.namespace,
        "sha": commit.oid,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "createdAt": timestamp(repo.created_at),
        "lastModified": timestamp(commit.date),
        "downloads": 0,
        "likes": 0,
        "tags": tags_of(card, commit.files),
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card or None,
        "model-index": card.get("model-index"),
        "usedStorage": sum({blob.etag: blob.size for blob in commit.files.values()}.values()),
        "siblings": [sibling(path, commit, blobs) for path in sorted(commit.files)],
    }
    identity = {"_id": repo.id, "id": repo.id} | ({"modelId": repo.id} if repo.type == "model" else {})
    return identity | {key: value for key, value in everything.items() if value is not None}


def sibling(path: str, commit: Commit, blobs: bool) -> dict[str, Any]:
    blob = commit.files[path]
    details: dict[str, Any] = {"size": blob.size, "blobId": blob.oid}
    if blob.sha256:
        details["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": pointer_size(blob)}
    return {"rfilename": path} | (details if blobs else {})


def list_tree(state: State, request: Request) -> Response:
    repo = state.repo(request)
    commit = state.commit_of(repo, request.args["revision"])
    folder = request.args.get("path", "").strip("/")
    folders = tree_oids(commit.files)
    if folder not in folders:
        raise Refusal(404, f"{folder} does not exist on {request.args['revision']!r}", "EntryNotFound")
    inside = f"{folder}/" if folder else ""
    paths = [path for path in sorted({*commit.files, *folders} - {""}) if path.startswith(inside)]
    if not request.flag("recursive"):
        paths = [path for path in paths if "/" not in path.removeprefix(inside)]
    expand = request.flag("expand")
    page, headers = state.page_of(request, paths, int(request.option("limit") or (50 if expand else 1000)))
    content = [entry(repo, commit, folders, path, expand) for path in page]
    return answer_json(content, headers=headers | {"X-Repo-Commit": commit.oid})


def paths_info(state: State, request: Request) -> Response:
    repo = state.repo(request)
    commit = state.commit_of(repo, request.args["revision"])
    form = parse_qs(request.body().decode())
    paths = form.get("paths", [])
    if len(paths) > MOST_PATHS:
        raise Refusal(413, "too many parameters")
    folders = tree_oids(commit.files)
    expand = form.get("expand", [""])[-1].lower() == "true"
    known = [path.strip("/") for path in paths if path.strip("/") in commit.files or path.strip("/") in folders]
    return answer_json([entry(repo, commit, folders, path, expand) for path in known])


def entry(repo: Repo, commit: Commit, folders: dict[str, str], path: str, expand: bool) -> dict[str, Any]:
    """What the API says of a file or folder."""
    blob = commit.files.get(path)
    if blob is None:
        content: dict[str, Any] = {"type": "directory", "oid": folders[path], "size": 0, "path": path}
    else:
        content = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
        if blob.sha256:
            content["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": pointer_size(blob)}
        if expand:
            content["securityFileStatus"] = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
    if expand:
        last = repo.last_change(commit, path)
        content["lastCommit"] = {"id": last.oid, "title": last.title, "date": timestamp(last.date)}
    return content


def pointer_size(blob: Blob) -> int:
    assert blob.sha256
    return len(pointer_text(blob.sha256, blob.size))


def resolve(state: State, request: Request) -> Response:
    repo = state.repo(request)
    commit = state.commit_of(repo, request.args["revision"])
    path = request.args["path"]
    blob = commit.files.get(path)
    if blob is None:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        refusal.commit = commit.oid
        raise refusal
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if blob.sha256:
        # The content is elsewhere: what the client needs to know of it stands in this answer.
        location = state.storage_endpoint + state.sign(f"/objects/{blob.sha256}")
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"', "Location": location}
        return Response(302, headers | linked)
    name = path.rpartition("/")[2]
    headers["ETag"] = f'"{blob.oid}"'
    headers["Content-Type"] = "text/plain; charset=utf-8"
    headers["Content-Disposition"] = f"inline; filename*=UTF-8''{quote(name)}; filename=\"{quote(name)}\";"
    return part_asked_for(request, Response(headers=headers, body=state.read(blob)))


def part_asked_for(request: Request, response: Response) -> Response:
    """The bytes that the header `Range` asks for."""
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "").strip())
    if not asked or asked.groups() == ("", ""):
        return response
    first, last = asked.groups()
    size = response.size
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last) + 1, size) if first and last else size
    if start >= size or end <= start:
        response.headers["Content-Range"] = f"bytes */{size}"
        return Response(416, response.headers)
    response.status, response.start, response.length = 206, start, end - start
    response.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return response


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


def list_commits(state: State, request: Request) -> Response:
    repo = state.repo(request)
    history = repo.history(state.commit_of(repo, request.args["revision"]))
    page, headers = state.page_of(request, history, 50)
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


def timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
