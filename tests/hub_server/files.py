"""Folders, files and their contents."""

import re
from typing import Any
from urllib.parse import parse_qs, quote

from .messages import Refusal, Request, Response, answer_json
from .objects import Blob, Commit, Repo, pointer_text, tree_oids
from .pages import page_of, timestamp
from .state import State


MOST_PATHS = 1000


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
    page, headers = page_of(state, request, paths, int(request.option("limit") or (50 if expand else 1000)))
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
    state.check_gate(request, repo)
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
