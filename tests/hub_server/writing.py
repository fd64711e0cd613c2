"""What changes the Hub: repositories, branches, tags, commits (all or nothing), and large files on their way there."""

import base64
import binascii
import json
import math
import secrets
from typing import Any

from .messages import Refusal, Request, Response, answer_json
from .reading import part_asked_for
from .repository import Blob, Commit, Repo, find_errors, is_ignored, is_large_file, read_metadata, tree_oids
from .state import DEFAULT_BRANCH, LARGE_FILE_PATTERNS, State, Upload, large_file_line


LARGE_FROM = 10 * 1024 * 1024  # bytes; git itself takes no larger file


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


def validate_yaml(state: State, request: Request) -> Response:
    readme = request.json().get("content", "")
    try:
        metadata = read_metadata(readme)
        errors = find_errors(metadata)
    except ValueError as error:
        metadata, errors = {}, [str(error)]
    warnings = [] if metadata or errors else ["empty or missing yaml metadata in repo card"]
    content = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return answer_json(content, 400 if errors else 200)


def preupload(state: State, request: Request) -> Response:
    repo, _ = state.repo_to_propose(request) if request.flag("create_pr") else state.repo_to_write(request)
    commit = state.commit_of(repo, request.args["revision"])
    asked = request.json()
    ignore = asked.get("gitIgnore", text_of(state, commit, ".gitignore"))
    attributes = text_of(state, commit, ".gitattributes")
    files = []
    for file in asked["files"]:
        path, size = file["path"], file["size"]
        sample = base64.b64decode(file["sample"])
        large = size > 0 and (is_large_file(attributes, path) or size > LARGE_FROM or is_binary(sample))
        answer = {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": is_ignored(ignore, path),
        }
        if path in commit.files:
            answer["oid"] = commit.files[path].etag
        files.append(answer)
    return answer_json({"files": files, "commitOid": commit.oid})


def is_binary(sample: bytes) -> bool:
    """Whether the first bytes of a file are not text."""
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        if error.start < len(sample) - 3:  # else a character was cut at the end of the sample
            return True
    return b"\0" in sample


def text_of(state: State, commit: Commit, path: str) -> str:
    return state.read(commit.files[path]).decode() if path in commit.files else ""


def commit(state: State, request: Request) -> Response:
    proposed = request.flag("create_pr")
    repo, user = state.repo_to_propose(request) if proposed else state.repo_to_write(request)
    ref = repo.ref_of(request.args["revision"])
    if ref is None:
        raise Refusal(404, f"Invalid rev id: {request.args['revision']}", "RevisionNotFound")
    if ref.startswith("refs/tags/"):
        raise Refusal(400, "A tag cannot be committed to")
    header, operations = read_operations(request)
    start = start_of(state, repo, ref, header.get("parentCommit"), proposed)
    files = dict(start.files)
    for key, value in operations:
        apply_operation(state, repo, files, key, value)
    check_result(state, files)
    title, message = header.get("summary", ""), header.get("description", "")
    url = f"{state.endpoint}/{repo.url_path}"
    content = {"success": True, "hookOutput": ""}
    if proposed:
        repo.pulls += 1
        content["pullRequestUrl"] = f"{url}/discussions/{repo.pulls}"
        ref = f"refs/pr/{repo.pulls}"
        repo.refs[ref] = start.oid
    made = state.add_commit(repo, ref, files, title, message, user.name)
    return answer_json(content | {"commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}"})


def start_of(state: State, repo: Repo, ref: str, parent: str | None, proposed: bool) -> Commit:
    """The commit that a new one comes after."""
    head = repo.commits[repo.refs[ref]]
    if not parent:
        return head
    start = state.commit_of(repo, parent)
    if start is not head and not proposed:  # a pull request may start from an older commit
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    return start


def read_operations(request: Request) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The header of a commit and its operations, one a line."""
    try:
        lines = [json.loads(line) for line in request.body().splitlines() if line.strip()]
        header, operations = lines[0], [(line["key"], line["value"]) for line in lines[1:]]
        if header["key"] != "header":
            raise ValueError("the first line is not the header")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Refusal(400, f"The commit is not readable: {error}") from error
    return header["value"], operations


def apply_operation(state: State, repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    """Change `files` by one line of a commit."""
    path = value["path"]
    if not path or path.startswith("/") or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
        raise Refusal(400, f"Invalid path: {path!r}")
    if key == "file":
        files[path] = state.put(content_of(value))
    elif key == "lfsFile":
        if value["oid"] not in repo.large_files:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path} ({value['oid']})")
        files[path] = Blob.large(value["oid"], state.large_file(value["oid"]).stat().st_size)
        attributes = state.read(files[".gitattributes"]).decode() if ".gitattributes" in files else ""
        if not is_large_file(attributes, path):
            files[".gitattributes"] = state.put(
                (attributes + large_file_line(path.replace(" ", "[[:space:]]"))).encode()
            )
    elif key == "deletedFile":
        if path not in files:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
        if not inside:
            raise Refusal(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
        for name in inside:
            del files[name]
    else:
        raise Refusal(400, f"Unknown operation: {key}")


def content_of(value: dict[str, Any]) -> bytes:
    if value.get("encoding") != "base64":
        return value["content"].encode()
    try:
        return base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise Refusal(400, f"Content of {value['path']} is not base64: {error}") from error


def check_result(state: State, files: dict[str, Blob]) -> None:
    """Raise if the new state of the repository is not one that the Hub takes."""
    both = set(tree_oids(files)) & set(files)
    if both:
        raise Refusal(400, f"These are files and folders at once: {', '.join(sorted(both))}")
    for path, blob in files.items():
        if blob.sha256 is None and blob.size > LARGE_FROM:
            raise Refusal(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
    if "README.md" in files:
        try:
            errors = find_errors(read_metadata(state.read(files["README.md"]).decode()))
        except ValueError as error:
            errors = [str(error)]
        if errors:
            raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")


def batch(state: State, request: Request) -> Response:
    """Say where to send each announced file; those that are here already need not be sent."""
    repo = state.repo(request)
    user = state.signed_in(request)
    if not user.can_write:
        raise Refusal(403, "You must use a write token to upload to a repository.")
    asked = request.json()
    if asked.get("operation") != "upload":
        raise Refusal(400, "Only uploads are announced here; downloads go through `resolve`")
    objects = [announce(state, repo, announced["oid"], announced["size"]) for announced in asked["objects"]]
    in_parts = any("chunk_size" in found.get("actions", {}).get("upload", {}).get("header", {}) for found in objects)
    return answer_json({"transfer": "multipart" if in_parts else "basic", "objects": objects})


def announce(state: State, repo: Repo, sha256: str, size: int) -> dict[str, Any]:
    content: dict[str, Any] = {"oid": sha256, "size": size}
    if sha256 in repo.large_files:
        return content
    key = secrets.token_hex(8)
    folder = state.root / "incoming" / key
    folder.mkdir()
    parts = math.ceil(size / state.part_size) if size >= state.multipart_from else 0
    state.uploads[key] = Upload(repo, sha256, size, folder, parts)
    if parts:
        addresses = {str(n): state.storage_endpoint + state.sign(f"/uploads/{key}/{n}") for n in range(1, parts + 1)}
        upload = {
            "href": state.endpoint + state.sign(f"/api/complete_multipart/{key}"),
            "header": {"chunk_size": str(state.part_size), **addresses},
        }
    else:
        upload = {"href": state.storage_endpoint + state.sign(f"/uploads/{key}"), "header": {}}
    verify = {"href": f"{state.endpoint}/{repo.url_path}.git/info/lfs/objects/verify/{key}", "header": {}}
    return content | {"authenticated": True, "actions": {"upload": upload, "verify": verify}}


def put_whole(state: State, request: Request) -> Response:
    upload = upload_of(state, request)
    request.save(upload.whole)
    return Response(headers={"ETag": f'"{request.args["key"]}"'})


def put_part(state: State, request: Request) -> Response:
    upload = upload_of(state, request)
    number = int(request.args["part"])
    request.save(upload.part(number))
    return Response(headers={"ETag": f'"{upload.took_part(number)}"'})


def complete(state: State, request: Request) -> Response:
    upload = upload_of(state, request)
    upload.complete({part["partNumber"]: part["etag"].strip('"') for part in request.json()["parts"]})
    return answer_json({"success": True})


def verify(state: State, request: Request) -> Response:
    """Check what arrived, and only then let commits point to it."""
    repo = state.repo(request)
    upload = state.uploads.get(request.args["key"])
    if upload is None or upload.repo is not repo:
        raise Refusal(404, "There is no such upload")
    if upload.sha256 not in repo.large_files:
        upload.check()
        upload.whole.replace(state.large_file(upload.sha256))
        repo.large_files.add(upload.sha256)
    return answer_json({"success": True})


def upload_of(state: State, request: Request) -> Upload:
    state.check_signature(request)
    upload = state.uploads.get(request.args["key"])
    if upload is None:
        raise Refusal(404, "NoSuchUpload")
    return upload


def get_object(state: State, request: Request) -> Response:
    if request.token is not None:
        raise Refusal(400, "Only one auth mechanism allowed: the address is signed, a token must not be sent")
    state.check_signature(request)
    sha256 = request.args["sha256"]
    response = Response(headers={"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}, file=state.large_file(sha256))
    return part_asked_for(request, response)
