"""What the Hub answers: a function an address, and the table of addresses."""

import base64
import json
import math
import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub import RepoCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from .contents import (
    DEFAULT_BRANCH,
    LARGE_FILE_PATTERNS,
    Blob,
    Commit,
    Contents,
    Repo,
    Upload,
    large_file_line,
    matches,
    repo_type,
)
from .faults import Refusal, Request, Response, answer_json, with_flipped_bit


LARGE_FROM = 10 * 1024 * 1024  # bytes; git itself takes no larger file


def whoami(hub: Contents, request: Request) -> Response:
    user = hub.signed_in(request)
    return answer_json({"type": "user", "id": user, "name": user, "orgs": [], "auth": {"type": "access_token"}})


def create_repo(hub: Contents, request: Request) -> Response:
    asked = request.json()
    user = hub.signed_in(request)
    kind, name = asked.get("type") or "model", f"{asked.get('organization') or user}/{asked['name']}"
    repo = Repo(name, kind, asked.get("visibility") == "private")
    hub.writer(request, repo.namespace)
    url = f"{hub.endpoint}/{repo.url_path}"
    if (kind, repo.id) in hub.repos:
        raise Refusal(409, f"You already created this {kind} repo: {repo.id}")
    attributes = hub.put("".join(map(large_file_line, LARGE_FILE_PATTERNS)).encode())
    repo.refs[DEFAULT_BRANCH] = Commit({".gitattributes": attributes}, "initial commit", "", user)
    hub.repos[kind, repo.id] = repo
    return answer_json({"url": url, "name": repo.id, "id": repo.id, "private": repo.private})


def list_repos(hub: Contents, request: Request) -> Response:
    user, wanted = hub.user(request), set(request.query.get("filter", []))
    readable = [repo for repo in hub.repos.values() if not repo.private or user == repo.namespace]
    found = [describe(hub, repo, repo.refs[DEFAULT_BRANCH]) for repo in readable if repo.type == repo_type(request)]
    return answer_json([description for description in found if wanted <= {*description["tags"]}])


def info(hub: Contents, request: Request) -> Response:
    repo = hub.repo(request)
    return answer_json(describe(hub, repo, hub.commit_of(repo, request), sizes=request.flag("blobs")))


def describe(hub: Contents, repo: Repo, commit: Commit, *, sizes: bool = False) -> dict[str, Any]:
    """What the API says of a repository at a commit."""
    try:
        card = read_metadata(hub.text_of(commit, "README.md"))
    except ValueError:
        card = {}
    return {
        "_id": repo.id,
        "id": repo.id,
        "sha": commit.oid,
        "private": repo.private,
        "lastModified": timestamp(commit.date),
        "tags": card.get("tags") or [],
        "cardData": card,
        "siblings": [
            {"rfilename": path} | (sizes_of(blob) | {"blobId": blob.oid} if sizes else {})
            for path, blob in sorted(commit.files.items())
        ],
    }


def sizes_of(blob: Blob) -> dict[str, Any]:
    large = {"oid": blob.sha256, "sha256": blob.sha256, "size": blob.size, "pointerSize": 130}
    return {"size": blob.size} | ({"lfs": large} if blob.sha256 else {})


def list_tree(hub: Contents, request: Request) -> Response:
    repo = hub.repo(request)
    commit = hub.commit_of(repo, request)
    parents = {path.rpartition("/")[0] for path in commit.files}
    folders = {"", *("/".join(path.split("/")[:depth]) for path in parents for depth in range(1, path.count("/") + 2))}
    folder = request.args.get("path", "")
    if folder not in folders:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    inside = f"{folder}/" if folder else ""
    paths = [path for path in sorted({*commit.files, *folders} - {"", folder}) if path.startswith(inside)]
    if not request.flag("recursive"):
        paths = [path for path in paths if "/" not in path.removeprefix(inside)]
    content = [
        {"path": path, "type": "file", "oid": commit.files[path].oid} | sizes_of(commit.files[path])
        if path in commit.files
        else {"path": path, "type": "directory", "oid": "0" * 40, "size": 0}
        for path in paths
    ]
    return answer_json(content, headers={"X-Repo-Commit": commit.oid})


def list_refs(hub: Contents, request: Request) -> Response:
    repo = hub.repo(request)

    def below(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit.oid}
            for ref, commit in repo.refs.items()
            if ref.startswith(prefix)
        ]

    content = {"branches": below("refs/heads/"), "converts": [], "tags": below("refs/tags/")}
    return answer_json(content | ({"pullRequests": below("refs/pr/")} if request.flag("include_prs") else {}))


def list_commits(hub: Contents, request: Request) -> Response:
    content = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": timestamp(commit.date),
        }
        for commit in hub.commit_of(hub.repo(request), request).history()
    ]
    return answer_json(content)


def timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def resolve(hub: Contents, request: Request) -> Response:
    """A file, or the address of a large one."""
    repo = hub.repo(request)
    commit = hub.commit_of(repo, request)
    blob = commit.files.get(request.args["path"])
    if blob is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
    headers = {"X-Repo-Commit": commit.oid}
    if blob.sha256:
        # What the client needs to know of the content stands in this answer.
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"'}
        return Response(302, headers | {"Location": hub.sign(f"/objects/{blob.sha256}")})
    return content_of(hub, blob.oid, request, headers)


def get_object(hub: Contents, request: Request) -> Response:
    hub.check_signature(request)
    return content_of(hub, request.args["sha256"], request, {})


def content_of(hub: Contents, key: str, request: Request, headers: dict[str, str]) -> Response:
    """A content, or of it the bytes that the header `Range` asks for."""
    content, headers = hub.stored[key], headers | {"ETag": f'"{key}"', "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not asked:
        return Response(200, headers, content)
    start, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
    if start >= end:
        return Response(416, headers | {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
    return Response(206, headers, content[start:end])


def create_branch(hub: Contents, request: Request) -> Response:
    repo = hub.repo_to_write(request)
    return add_ref(repo, f"refs/heads/{request.args['branch']}", repo.refs[DEFAULT_BRANCH])


def create_tag(hub: Contents, request: Request) -> Response:
    repo = hub.repo_to_write(request)
    return add_ref(repo, f"refs/tags/{request.json()['tag']}", hub.commit_of(repo, request))


def add_ref(repo: Repo, ref: str, commit: Commit) -> Response:
    if ref in repo.refs:
        raise Refusal(409, f"Reference already exists: {ref}")
    repo.refs[ref] = commit
    return Response()


def validate_yaml(hub: Contents, request: Request) -> Response:
    try:
        errors = find_errors(read_metadata(request.json()["content"]))
    except ValueError as error:
        errors = [str(error)]
    return answer_json({"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200)


def read_metadata(readme: str) -> dict[str, Any]:
    """The metadata of a card; empty where it has none.

    Raises:
        ValueError: if they are no mapping in YAML.
    """
    try:
        return RepoCard(readme, ignore_metadata_errors=True).data.to_dict() if readme.startswith("---") else {}
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"YAML is not readable: {error}") from error


def find_errors(metadata: Mapping[str, Any]) -> list[str]:
    """What the Hub would not accept: values of the wrong type, and a `model-index` of the wrong shape."""
    texts = ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation")
    errors = [f'"{key}" must be a string' for key in texts if not isinstance(metadata.get(key, ""), str)]
    for key in ("base_model", "datasets", "language", "license", "metrics", "tags"):
        value = metadata.get(key, [])
        values = [value] if isinstance(value, str) and key != "tags" else value
        if not isinstance(values, list) or not all(isinstance(part, str) for part in values):
            errors.append(f'"{key}" must be an array of strings')
    try:
        model_index_to_eval_results(metadata.get("model-index", [{"name": "", "results": []}]))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        errors.append(f'"model-index" has another shape: {error!r}')
    return errors


def preupload(hub: Contents, request: Request) -> Response:
    """Say of each file whether it is large, known or ignored."""
    repo = hub.repo_to_write(request)
    commit, asked = hub.commit_of(repo, request), request.json()
    attributes = hub.text_of(commit, ".gitattributes")
    ignore = asked.get("gitIgnore", hub.text_of(commit, ".gitignore"))
    files = []
    for file in asked["files"]:
        path, size, sample = file["path"], file["size"], base64.b64decode(file["sample"])
        large = size > 0 and (matches(attributes, path) or size > LARGE_FROM or is_binary(sample))
        known = {"oid": commit.files[path].key} if path in commit.files else {}
        mode = "lfs" if large else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": matches(ignore, path)} | known)
    return answer_json({"files": files, "commitOid": commit.oid})


def is_binary(sample: bytes) -> bool:
    """Whether the first bytes of a file are not text, where a character may be cut at the end."""
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.start < len(sample) - 3
    return b"\0" in sample


def commit(hub: Contents, request: Request) -> Response:
    """Make a commit, all or nothing, on a branch or as a pull request."""
    repo, ref = hub.repo_to_write(request), None
    header, *operations = [json.loads(line) for line in request.body().splitlines()]
    start = hub.commit_of(repo, request)
    parent = header["value"].get("parentCommit")
    if request.flag("create_pr"):
        ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}"
        start = repo.find(parent) or start if parent else start  # it may start from an older commit
    elif parent and parent != start.oid:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(start.files)
    for operation in operations:
        apply(hub, repo, files, operation["key"], operation["value"])
    made = Commit(
        files, header["value"]["summary"], header["value"].get("description", ""), hub.signed_in(request), start
    )
    url = f"{hub.endpoint}/{repo.url_path}"
    content = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}"}
    if ref:
        content["pullRequestUrl"] = f"{url}/discussions/{ref.rpartition('/')[2]}"
    repo.refs[ref or repo.ref_of(request.args["revision"]) or DEFAULT_BRANCH] = made
    return answer_json(content)


def apply(hub: Contents, repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    """Change `files` by one line of a commit."""
    path = value["path"]
    if key == "file":
        files[path] = hub.put(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in repo.large_files:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path} ({value['oid']})")
        files[path] = Blob.of(hub.stored[value["oid"]], large=True)
        attributes = hub.stored[files[".gitattributes"].key].decode() if ".gitattributes" in files else ""
        if not matches(attributes, path):
            files[".gitattributes"] = hub.put((attributes + large_file_line(path)).encode())
    elif key == "deletedFile" and path in files:
        del files[path]
    else:
        raise Refusal(404, f"There is no {path}, or no operation {key}", "EntryNotFound")


def batch(hub: Contents, request: Request) -> Response:
    """Say where to send each announced file; those that are here already need not be sent."""
    repo = hub.repo_to_write(request)
    objects = [announce(hub, repo, announced["oid"], announced["size"]) for announced in request.json()["objects"]]
    in_parts = any("chunk_size" in found.get("actions", {}).get("upload", {}).get("header", {}) for found in objects)
    return answer_json({"transfer": "multipart" if in_parts else "basic", "objects": objects})


def announce(hub: Contents, repo: Repo, sha256: str, size: int) -> dict[str, Any]:
    content: dict[str, Any] = {"oid": sha256, "size": size}
    if sha256 in repo.large_files:
        return content
    key = secrets.token_hex(8)
    hub.uploads[key] = Upload(repo, sha256, size)
    if size >= hub.multipart_from:
        count = math.ceil(size / hub.part_size)
        addresses = {str(number): hub.sign(f"/uploads/{key}/{number}") for number in range(1, count + 1)}
        header = {"chunk_size": str(hub.part_size), **addresses}
        upload = {"href": hub.sign(f"/api/complete_multipart/{key}"), "header": header}
    else:
        upload = {"href": hub.sign(f"/uploads/{key}"), "header": {}}
    verify = {"href": f"{hub.endpoint}/{repo.url_path}.git/info/lfs/objects/verify/{key}", "header": {}}
    return content | {"authenticated": True, "actions": {"upload": upload, "verify": verify}}


def put_part(hub: Contents, request: Request) -> Response:
    """Take a large file, whole or a part of it."""
    hub.check_signature(request)
    content = with_flipped_bit(request.body(), 0) if request.damaged else request.body()
    hub.uploads[request.args["key"]].parts[int(request.args.get("part", 1))] = content
    return Response(headers={"ETag": f'"{request.args["key"]}"'})


def complete(hub: Contents, request: Request) -> Response:
    hub.check_signature(request)
    return answer_json({"success": True})


def verify(hub: Contents, request: Request) -> Response:
    """Check what arrived, and only then let commits point to it."""
    upload = hub.uploads[request.args["key"]]
    blob = Blob.of(whole := b"".join(part for _, part in sorted(upload.parts.items())), large=True)
    if (blob.sha256, blob.size) != (upload.sha256, upload.size):
        raise Refusal(422, f"Object {upload.sha256} is not what was announced: wrong size or SHA-256")
    hub.stored[blob.key] = whole
    upload.repo.large_files.add(blob.key)
    return answer_json({"success": True})


REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"
REVISION = r"(?P<revision>[^/]+)"
PAGE = rf"/(?P<kind>datasets/)?{REPO}"
# `GET` answers `HEAD` too.
ROUTES = {
    ("GET", "/api/whoami-v2"): whoami,
    ("POST", "/api/validate-yaml"): validate_yaml,
    ("POST", "/api/repos/create"): create_repo,
    ("GET", "/api/(?P<kind>models|datasets)"): list_repos,
    ("GET", rf"{API}(/revision/{REVISION})?"): info,
    ("GET", rf"{API}/tree/{REVISION}(/(?P<path>.+))?"): list_tree,
    ("GET", rf"{API}/refs"): list_refs,
    ("GET", rf"{API}/commits/{REVISION}"): list_commits,
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)"): create_branch,
    ("POST", rf"{API}/tag/{REVISION}"): create_tag,
    ("POST", rf"{API}/preupload/{REVISION}"): preupload,
    ("POST", rf"{API}/commit/{REVISION}"): commit,
    ("GET", rf"{PAGE}/resolve/{REVISION}/(?P<path>.+)"): resolve,
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch"): batch,
    ("POST", rf"{PAGE}\.git/info/lfs/objects/verify/(?P<key>[^/]+)"): verify,
    ("POST", "/api/complete_multipart/(?P<key>[^/]+)"): complete,
    ("PUT", "/uploads/(?P<key>[^/]+)(/(?P<part>[0-9]+))?"): put_part,
    ("GET", "/objects/(?P<sha256>[^/]+)"): get_object,
}


def answer(hub: Contents, request: Request) -> Response | None:
    """What the Hub answers; `None` for an address that it does not know."""
    method = "GET" if request.method == "HEAD" else request.method
    for (wanted, path), route in ROUTES.items():
        if method == wanted and (found := re.fullmatch(path, request.path)):
            request.args = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
            request.body()  # before the lock: a slow client must not keep others waiting
            try:
                with hub.lock:
                    return route(hub, request)
            except Refusal as refusal:
                return refusal.response()
    return None
