"""Large files: announcing them to the Hub, and sending them to the storage and fetching them from there."""

import math
import secrets
from typing import Any

from .files import part_asked_for
from .messages import Refusal, Request, Response, answer_json
from .objects import Repo
from .state import State
from .uploads import Upload


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
