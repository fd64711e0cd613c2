"""A Hub that listens on loopback, and what a test asks of it."""

import hashlib
import os
import re
import shutil
import socket
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from . import reading, writing
from .faults import Fault
from .messages import COPY_CHUNK, Disconnected, Refusal, Request, Response
from .repository import Blob, Commit, Repo
from .state import DEFAULT_BRANCH, State, User


Handler = Callable[[State, Request], Response]

# `{repo}` is namespace/name; what else stands in braces is a piece without a slash, unless a star follows.
PIECES = {
    "{kind}": "(?P<kind>models|datasets)",
    "{prefix}": "(?P<prefix>datasets/)?",
    "{repo}": "(?P<repo>[^/]+/[^/]+)",
}
API = "/api/{kind}/{repo}"


@dataclass(frozen=True)
class Route:
    """An address.

    Args:
        method (`str`): `GET` answers `HEAD` too.
        path (`str`): With names in braces for what varies.
        handler (`Handler`): What answers.
        purpose (`str`): What the client wants there.
        origin (`str`, *optional*, defaults to `"hub"`): `"hub"` or `"storage"`.
        slow (`bool`, *optional*, defaults to `False`): Whether it handles large files: the lock is not held then.
    """

    method: str
    path: str
    handler: Handler
    purpose: str
    origin: str = "hub"
    slow: bool = False

    @cached_property
    def expression(self) -> re.Pattern[str]:
        pieces = re.split(r"(\{\w+\*?\})", self.path)
        named = [PIECES.get(piece) or re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", piece) for piece in pieces]
        return re.compile("".join(re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", piece) for piece in named))

    def match(self, request: Request) -> dict[str, str] | None:
        """What the path says where the route has names, or `None` if the request is not for this route."""
        method = "GET" if request.method == "HEAD" else request.method
        found = self.expression.fullmatch(request.path)
        if not found or (method, request.origin) != (self.method, self.origin):
            return None
        args = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
        return args | ({"kind": args["prefix"]} if "prefix" in args else {})


ROUTES = (
    Route("GET", "/api/whoami-v2", reading.whoami, "`whoami`: name, organisations, role of the token"),
    Route("POST", "/api/validate-yaml", writing.validate_yaml, "metadata of a card, before `create_commit`"),
    Route("POST", "/api/repos/create", writing.create, "`create_repo`"),
    Route("GET", "/api/{kind}", reading.list_repos, "`list_models`, `list_datasets`"),
    Route("GET", API, reading.info, "`model_info`, `dataset_info`, `repo_info`"),
    Route("GET", API + "/revision/{revision}", reading.info, "the same at a revision"),
    Route("GET", API + "/tree/{revision}", reading.list_tree, "`list_repo_tree`, `snapshot_download`"),
    Route("GET", API + "/tree/{revision}/{path*}", reading.list_tree, "the same for a folder"),
    Route("POST", API + "/paths-info/{revision}", reading.paths_info, "`get_paths_info`, `HfFileSystem`"),
    Route("GET", API + "/refs", reading.list_refs, "`list_repo_refs`"),
    Route("GET", API + "/commits/{revision}", reading.list_commits, "`list_repo_commits`"),
    Route("POST", API + "/branch/{branch}", writing.create_branch, "`create_branch`"),
    Route("POST", API + "/tag/{revision}", writing.create_tag, "`create_tag`"),
    Route(
        "POST", API + "/preupload/{revision}", writing.preupload, "`create_commit`: is a file large, known, ignored?"
    ),
    Route("POST", API + "/commit/{revision}", writing.commit, "`create_commit`: the commit, or a pull request"),
    Route(
        "GET", "/{prefix}{repo}/resolve/{revision}/{path*}", reading.resolve, "`hf_hub_download`: metadata and content"
    ),
    Route(
        "POST",
        "/{prefix}{repo}.git/info/lfs/objects/batch",
        writing.batch,
        "`create_commit`: where do large files go?",
    ),
    Route(
        "POST",
        "/{prefix}{repo}.git/info/lfs/objects/verify/{key}",
        writing.verify,
        "a large file has arrived whole",
        slow=True,
    ),
    Route("POST", "/api/complete_multipart/{key}", writing.complete, "all parts of a large file were sent", slow=True),
    Route("PUT", "/uploads/{key}", writing.put_whole, "a large file as a whole (`basic`)", "storage", slow=True),
    Route(
        "PUT", "/uploads/{key}/{part}", writing.put_part, "a part of a large file (`multipart`)", "storage", slow=True
    ),
    Route("GET", "/objects/{sha256}", writing.get_object, "content of a large file, whole or a range", "storage"),
)


# Settings of whoever runs the tests that would lead a client elsewhere.
FOREIGN_SETTINGS = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "HUGGINGFACE_")


@dataclass
class Seen:
    """A request that was answered.

    Args:
        origin (`str`): `"hub"` or `"storage"`.
        method, path (`str`): What was asked, without the query.
        query (`str`): The query.
        user (`str` or `None`): Whose token was sent.
        status (`int` or `None`): `None` if the connection was cut before an answer.
        received, sent (`int`): Bytes of the bodies.
        done (`bool`): Whether nothing more will be sent.
    """

    origin: str
    method: str
    path: str
    query: str
    user: str | None
    status: int | None = None
    received: int = 0
    sent: int = 0
    done: bool = False

    def __str__(self) -> str:
        who, status = self.user or "-", self.status or "cut"
        return f"{status} {self.method} {self.path} ({self.origin}, {who}, {self.received} in, {self.sent} out)"


class HubServer:
    """A Hub on loopback, for the unmodified client.

    Args:
        root (`Path`): Folder for the contents of large files.
        port (`int`, *optional*, defaults to `0`): Port of the Hub; 0 takes a free one.
        multipart_from (`int`, *optional*, defaults to `16_000_000`): Bytes from which a large file goes up in parts.
        part_size (`int`, *optional*, defaults to `8_000_000`): Bytes of a part.
        page_size (`int`, *optional*, defaults to `1000`): Most entries of a page of a list.

    Example:

    ```python
    with HubServer(root=tmp_path) as hub:
        hub.add_user("alice", "hf_alice")
        api = HfApi(endpoint=hub.endpoint, token="hf_alice")
    ```
    """

    def __init__(
        self,
        root: Path,
        *,
        port: int = 0,
        multipart_from: int = 16_000_000,
        part_size: int = 8_000_000,
        page_size: int = 1000,
    ):
        self.state = State(Path(root), multipart_from=multipart_from, part_size=part_size, page_size=page_size)
        self.requests: list[Seen] = []
        self.unknown: list[str] = []  # addresses that were asked for and are none
        self.broken: list[str] = []  # tracebacks of what went wrong in this server
        self.stopping = threading.Event()
        self._faults: list[Fault] = []
        self._faults_lock = threading.Lock()
        self._listeners = [Listener(self, "hub", port), Listener(self, "storage", 0)]
        self.endpoint, self.storage_endpoint = (listener.address for listener in self._listeners)
        self.state.endpoint, self.state.storage_endpoint = self.endpoint, self.storage_endpoint

    def __enter__(self) -> "HubServer":
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        for listener in self._listeners:
            listener.stop()

    # For tests: setting the scene

    def add_user(self, name: str, token: str, can_write: bool = True, orgs: Sequence[str] = ()) -> None:
        """Let whoever has `token` in as `name`; a user may have several tokens."""
        self.state.users[token] = User(name, can_write, tuple(orgs))

    def add_model(self, repo_id: str, files: Mapping[str, Path | str]) -> None:
        """Put up a public repository of large files, given as paths, and texts."""
        blobs = {}
        for name, content in files.items():
            if isinstance(content, str):
                blobs[name] = self.state.put(content.encode())
                continue
            with content.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            shutil.copyfile(content, self.state.large_file(digest))
            blobs[name] = Blob.large(digest, content.stat().st_size)
        repo = Repo(repo_id, "model", False, large_files={blob.sha256 for blob in blobs.values() if blob.sha256})
        with self.state.lock:
            self.state.add_commit(repo, DEFAULT_BRANCH, blobs, "initial commit", "", repo.namespace)
            self.state.repos["model", repo_id] = repo

    def env(self, token: str | None = None, home: Path | None = None) -> dict[str, str]:
        """Environment of a process that is to talk to this Hub and to no other.

        Args:
            token (`str`, *optional*): Token; without one the process is anonymous.
            home (`Path`, *optional*): Folder for the client's caches; by default a folder beside the contents.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_SETTINGS)}
        return (
            kept
            | {
                "HF_ENDPOINT": self.endpoint,
                "HF_HOME": str(home or self.state.root / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "NO_PROXY": "127.0.0.1",
            }
            | ({"HF_TOKEN": token} if token else {})
        )

    def fail(self, fault: Fault) -> Fault:
        """Put a fault in the way of the next requests that it matches; one request meets at most one fault."""
        with self._faults_lock:
            self._faults.append(fault)
        return fault

    # For tests: looking at what came of it

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.state.repos[repo_type, repo_id]

    def head(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> str:
        """Id of the commit that `revision` points to."""
        return self._commit(repo_id, revision, repo_type).oid

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Contents of all files, by path."""
        with self.state.lock:
            files = self._commit(repo_id, revision, repo_type).files
            return {path: self.state.read(blob) for path, blob in files.items()}

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Commits up to `revision`, last first; the first of a repository is the Hub's own."""
        with self.state.lock:
            return self.repo(repo_id, repo_type).history(self._commit(repo_id, revision, repo_type))

    def _commit(self, repo_id: str, revision: str, repo_type: str) -> Commit:
        commit = self.repo(repo_id, repo_type).find(revision)
        if commit is None:
            raise KeyError(f"{repo_id} has no revision {revision}")
        return commit

    # Answering

    def respond(self, request: Request) -> Response:
        """The answer to a request, with whatever fault lies in its way."""
        with self._faults_lock:
            fault = next((fault for fault in self._faults if fault.meets(request)), None)
        try:
            if fault is None:
                return self._answer(request)
            fault.behavior.before(request, self.stopping.wait)
            return fault.behavior.after(fault.behavior.instead(request) or self._answer(request))
        except (Disconnected, ConnectionError):
            raise Disconnected from None
        except Exception:
            self.broken.append(traceback.format_exc())
            return Refusal(500, "The Hub of the tests is broken here: see `HubServer.broken`").response()

    def _answer(self, request: Request) -> Response:
        try:
            for route in ROUTES:
                args = route.match(request)
                if args is None:
                    continue
                request.args = args
                if route.slow:
                    return route.handler(self.state, request)
                request.body()  # before the lock: a slow client must not keep others waiting
                with self.state.lock:
                    return route.handler(self.state, request)
            self.unknown.append(f"{request.method} {request.path}")
            raise Refusal(501, f"This Hub does not know {request.method} {request.path}")
        except Refusal as refusal:
            return refusal.response()


class Listener(ThreadingHTTPServer):
    """One of the two addresses, and the connections to it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, origin: str, port: int):
        self.hub = hub
        self.origin = origin
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Connection)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error here; anything else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Connection(BaseHTTPRequestHandler):
    """Requests of one connection, one after the other."""

    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        hub = self.server.hub
        length = int(self.headers.get("Content-Length") or 0)
        request = Request(self.server.origin, self.command, self.path, self.headers, length, self.rfile)
        user = hub.state.users.get(request.token or "")
        seen = Seen(
            self.server.origin, self.command, request.path, self.path.partition("?")[2], user.name if user else None
        )
        hub.requests.append(seen)
        try:
            response = hub.respond(request)
            while request.read(COPY_CHUNK):  # what was not wanted must not be taken for the next request
                pass
            seen.status, seen.received = response.status, request.received
            self._write(response, seen)
        except (Disconnected, ConnectionError):
            seen.received = request.received
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            seen.done = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _write(self, response: Response, seen: Seen) -> None:
        def write(chunk: bytes) -> None:
            seen.sent += len(chunk)
            self.wfile.write(chunk)

        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", uuid.uuid4().hex)
        self.send_header("Content-Length", str(response.content_length))
        self.end_headers()
        if self.command != "HEAD":
            response.send(write, self.server.hub.stopping.wait)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept in `HubServer.requests`; nothing is printed."""
