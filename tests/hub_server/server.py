"""A Hub that listens on loopback, and what a test asks of it."""

import os
import socket
import sys
import threading
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .contents import DEFAULT_BRANCH, Commit, Contents, Repo
from .faults import CHUNK, Disconnected, Fault, Refusal, Request, Response
from .routes import answer


# Settings of whoever runs the tests that would lead a client elsewhere.
FOREIGN_SETTINGS = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "HUGGINGFACE_")


@dataclass
class Seen:
    """A request that was answered.

    Args:
        method, path (`str`): What was asked, without the query.
        user (`str` or `None`): Whose token was sent.
        status (`int` or `None`): `None` if the connection was cut before an answer.
        received, sent (`int`): Bytes of the bodies.
        done (`bool`): Whether nothing more will be sent.
    """

    method: str
    path: str
    user: str | None
    status: int | None = None
    received: int = 0
    sent: int = 0
    done: bool = False

    def __str__(self) -> str:
        who, status = self.user or "-", self.status or "cut"
        return f"{status} {self.method} {self.path} ({who}, {self.received} in, {self.sent} out)"


class HubServer:
    """A Hub on loopback, for the unmodified client.

    Args:
        home (`Path`): Folder for the caches of clients in other processes.
        port (`int`, *optional*, defaults to `0`): Port; 0 takes a free one.
    """

    def __init__(self, home: Path, *, port: int = 0):
        self.home = home
        self.requests: list[Seen] = []
        self.unknown: list[str] = []  # addresses that were asked for and are none
        self.broken: list[str] = []  # tracebacks of what went wrong in this server
        self.stopping = threading.Event()
        self._faults: list[Fault] = []
        self._faults_lock = threading.Lock()
        # Large files are stored elsewhere: to another address the client does not follow before it has looked at the answer.
        self._listeners = [Listener(self, port), Listener(self, 0)]
        self.endpoint, storage = (f"http://127.0.0.1:{listener.server_address[1]}" for listener in self._listeners)
        self.contents = Contents(self.endpoint, storage)

    def __enter__(self) -> "HubServer":
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        for listener in self._listeners:
            listener.stop()

    # For tests: setting the scene

    def add_user(self, name: str, token: str) -> None:
        """Let whoever has `token` in as `name`."""
        self.contents.users[token] = name

    def add_model(self, repo_id: str, files: Mapping[str, Path | str]) -> None:
        """Put up a public repository of large files, given as paths, and texts."""
        with self.contents.lock:
            blobs = {
                name: self.contents.put(given.encode())
                if isinstance(given, str)
                else self.contents.put(given.read_bytes(), large=True)
                for name, given in files.items()
            }
            repo = Repo(repo_id, "model", False)
            repo.refs[DEFAULT_BRANCH] = Commit(blobs, "initial commit", "", repo.namespace)
            self.contents.repos["model", repo_id] = repo

    def env(self, token: str | None = None, home: Path | None = None) -> dict[str, str]:
        """Environment of a process that is to talk to this Hub and to no other.

        Args:
            token (`str`, *optional*): Token; without one the process is anonymous.
            home (`Path`, *optional*): Folder for the client's caches; that of the server by default.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_SETTINGS)}
        own = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home or self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return kept | own | ({"HF_TOKEN": token} if token else {})

    def fail(self, fault: Fault) -> Fault:
        """Put a fault in the way of the next requests that it matches; one request meets at most one fault."""
        with self._faults_lock:
            self._faults.append(fault)
        return fault

    # For tests: looking at what came of it

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.contents.repos[repo_type, repo_id]

    def head(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> str:
        """Id of the commit that `revision` points to."""
        return self.commits(repo_id, revision, repo_type)[0].oid

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Contents of all files, by path."""
        files = self.commits(repo_id, revision, repo_type)[0].files
        return {path: self.contents.stored[blob.key] for path, blob in files.items()}

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Commits up to `revision`, last first; the first of a repository is the Hub's own."""
        with self.contents.lock:
            commit = self.repo(repo_id, repo_type).find(revision)
        if commit is None:
            raise KeyError(f"{repo_id} has no revision {revision}")
        return commit.history()

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
        if (found := answer(self.contents, request)) is not None:
            return found
        self.unknown.append(f"{request.method} {request.path}")
        return Refusal(501, f"This Hub does not know {request.method} {request.path}").response()


class Listener(ThreadingHTTPServer):
    """One of the two addresses, and the connections to it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, port: int):
        self.hub = hub
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Connection)

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
        request = Request(self.command, self.path, self.headers, length, self.rfile)
        seen = Seen(self.command, request.path, hub.contents.users.get(request.token or ""))
        hub.requests.append(seen)
        try:
            response = hub.respond(request)
            while request.read(CHUNK):  # what was not wanted must not be taken for the next request
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
