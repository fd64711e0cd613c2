"""Making, changing, describing and listing repositories."""

from typing import Any

from .cards import as_list, read_metadata, tags_of
from .files import pointer_size
from .messages import Refusal, Request, Response, answer_json
from .objects import Commit, Repo
from .pages import page_of, timestamp
from .state import DEFAULT_BRANCH, LARGE_FILE_PATTERNS, State, large_file_line, repo_type


BRIEF = ("private", "tags", "createdAt", "downloads", "likes", "library_name", "pipeline_tag", "gated")
FULL = (*BRIEF, "author", "sha", "lastModified", "siblings", "disabled")
DETAILED = (*FULL, "cardData", "model-index", "usedStorage")


def create(state: State, request: Request) -> Response:
    asked = request.json()
    kind = asked.get("type") or "model"
    if kind not in ("model", "dataset"):
        raise Refusal(501, f"This Hub has models and datasets, but no {kind}s")
    user = state.signed_in(request)
    repo = Repo(
        f"{asked.get('organization') or user.name}/{asked['name']}", kind, asked.get("visibility") == "private"
    )
    state.writer(request, repo.namespace)
    url = f"{state.endpoint}/{repo.url_path}"
    if (kind, repo.id) in state.repos:
        raise Refusal(409, f"You already created this {kind} repo: {repo.id}", url=url, name=repo.id)
    attributes = state.put("".join(map(large_file_line, LARGE_FILE_PATTERNS)).encode())
    state.add_commit(repo, DEFAULT_BRANCH, {".gitattributes": attributes}, "initial commit", "", user.name)
    state.repos[kind, repo.id] = repo
    return answer_json({"url": url, "name": repo.id, "id": repo.id, "private": repo.private})


def delete(state: State, request: Request) -> Response:
    asked = request.json()
    user = state.signed_in(request)
    name = f"{asked.get('organization') or user.name}/{asked['name']}"
    request.args |= {"repo": name, "kind": f"{asked.get('type') or 'model'}s"}
    repo, _ = state.repo_to_write(request)
    del state.repos[repo.type, repo.id]
    return Response()


def change_settings(state: State, request: Request) -> Response:
    repo, _ = state.repo_to_write(request)
    asked = request.json()
    repo.private = asked.get("visibility", "private" if repo.private else "public") == "private"
    repo.gated = asked.get("gated", repo.gated)
    return answer_json({"private": repo.private, "gated": repo.gated})


def check_access(state: State, request: Request) -> Response:
    repo = state.repo(request)
    state.check_gate(request, repo)
    return answer_json({})


def check_write_access(state: State, request: Request) -> Response:
    state.repo_to_write(request)
    return answer_json({})


def info(state: State, request: Request) -> Response:
    repo = state.repo(request)
    commit = state.commit_of(repo, request.args.get("revision", DEFAULT_BRANCH))
    properties = tuple(request.query.get("expand", DETAILED))
    return answer_json(describe(state, repo, commit, properties, blobs=request.flag("blobs")))


def list_repos(state: State, request: Request) -> Response:
    user = state.user(request)
    kind = repo_type(request.args)
    properties = request.query.get("expand") or [
        *(FULL if request.flag("full") else BRIEF),
        *(("cardData", "model-index") if request.flag("cardData") else ()),
    ]
    found = []
    for repo in sorted(state.repos.values(), key=lambda repo: repo.created_at, reverse=True):
        if repo.type != kind or not state.may_read(user, repo):
            continue
        description = describe(
            state, repo, state.commit_of(repo, DEFAULT_BRANCH), ("tags", "lastModified"), blobs=False
        )
        wanted = {*request.query.get("filter", []), *request.query.get("pipeline_tag", [])}
        author, search = request.option("author"), (request.option("search") or "").lower()
        if wanted <= set(description["tags"]) and author in (None, repo.namespace) and search in repo.id.lower():
            found.append((description["lastModified"], repo))
    if request.option("sort") == "lastModified":
        found.sort(key=lambda item: item[0], reverse=True)
    page, headers = page_of(state, request, [repo for _, repo in found], int(request.option("limit") or 1000))
    content = [
        describe(state, repo, state.commit_of(repo, DEFAULT_BRANCH), tuple(properties), blobs=False) for repo in page
    ]
    return answer_json(content, headers=headers)


def describe(state: State, repo: Repo, commit: Commit, properties: tuple[str, ...], *, blobs: bool) -> dict[str, Any]:
    """What the API says of a repository at a commit: `id`, and the `properties` that were asked for."""
    readme = commit.files.get("README.md")
    try:
        card = read_metadata(state.read(readme).decode()) if readme else {}
    except ValueError:
        card = {}
    everything: dict[str, Any] = {
        "author": repo.namespace,
        "sha": commit.oid,
        "private": repo.private,
        "gated": repo.gated,
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
        "baseModels": as_list(card.get("base_model")) or None,
        "usedStorage": sum({blob.etag: blob.size for blob in commit.files.values()}.values()),
        "siblings": [sibling(path, commit, blobs) for path in sorted(commit.files)],
    }
    identity = {"_id": repo.id, "id": repo.id} | ({"modelId": repo.id} if repo.type == "model" else {})
    return identity | {key: everything[key] for key in properties if everything.get(key) is not None}


def sibling(path: str, commit: Commit, blobs: bool) -> dict[str, Any]:
    blob = commit.files[path]
    details: dict[str, Any] = {"size": blob.size, "blobId": blob.oid}
    if blob.sha256:
        details["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": pointer_size(blob)}
    return {"rfilename": path} | (details if blobs else {})
