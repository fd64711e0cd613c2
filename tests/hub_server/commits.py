"""Commits: which way a file goes up, and the commit itself, all or nothing."""

import base64
import binascii
import json
from typing import Any

from .cards import find_errors, read_metadata
from .discussions import open_pull
from .messages import Refusal, Request, Response, answer_json
from .objects import Blob, Commit, Repo, tree_oids
from .patterns import is_ignored, is_large_file
from .state import State, large_file_line


LARGE_FROM = 10 * 1024 * 1024  # bytes; git itself takes no larger file


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
        discussion = open_pull(repo, user, title, message, ref, start)
        content["pullRequestUrl"] = f"{url}/discussions/{discussion.num}"
        ref = discussion.ref
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
