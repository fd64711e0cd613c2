"""What goes over the wire (a request, an answer, a refusal), and what can go wrong there, put in on purpose."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from io import BufferedIOBase
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit


CHUNK = 1 << 20


class Disconnected(Exception):
    """The connection is gone; nothing more is read from it or written to it."""


@dataclass
class Request:
    """What the client asks.

    Args:
        method (`str`): `GET`, `HEAD`, `POST`, `PUT` or `DELETE`.
        target (`str`): Path and query, still quoted.
        headers (`Message`): Names are not case-sensitive.
        length (`int`): Bytes of the body.
        stream (`BufferedIOBase`): Where the body is read from.
        args (`dict[str, str]`): What the route found in the path, unquoted.
        damaged (`bool`): Whether an upload is to be stored wrong.
    """

    method: str
    target: str
    headers: Message
    length: int
    stream: BufferedIOBase
    args: dict[str, str] = field(default_factory=dict)
    damaged: bool = False
    received: int = 0
    _body: bytes | None = None

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("1", "true")

    @property
    def token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" else None

    def read(self, size: int) -> bytes:
        """The next bytes of the body, at most `size`; empty at its end."""
        wanted = min(size, self.length - self.received)
        data = self.stream.read(wanted) if wanted else b""
        if len(data) < wanted:
            raise Disconnected
        self.received += len(data)
        return data

    def body(self) -> bytes:
        """The whole body; it is kept, so that it may be asked for again."""
        if self._body is None:
            self._body = self.read(self.length)
        return self._body

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")


@dataclass
class Response:
    """What is answered.

    Args:
        status (`int`, *optional*, defaults to `200`): Status code.
        headers (`dict[str, str]`, *optional*): Besides the length.
        body (`bytes`, *optional*): Content.
        length (`int`, *optional*): Bytes that the header announces and that are sent: the whole content by default.
        stop_after (`int`, *optional*): Bytes of the content after which the connection is cut.
        drip (`tuple[int, float]`, *optional*): Bytes sent at once, and seconds in between.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: int | None = None
    stop_after: int | None = None
    drip: tuple[int, float] | None = None

    @property
    def content_length(self) -> int:
        return len(self.body) if self.length is None else self.length

    def send(self, write: Callable[[bytes], Any], pause: Callable[[float], Any]) -> None:
        """Write the content with `write`."""
        end = self.content_length if self.stop_after is None else min(self.content_length, self.stop_after)
        step, seconds = self.drip or (CHUNK, 0.0)
        for place in range(0, end, step):
            write(self.body[place : min(place + step, end)])
            if seconds:
                pause(seconds)
        if end < self.content_length:
            raise Disconnected


def answer_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    body = json.dumps(content, default=str).encode()
    return Response(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, body)


class Refusal(Exception):
    """An answer with an error: what the Hub says, and headers such as the code by which the client tells its errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": " ".join(message.split())} | ({"X-Error-Code": code} if code else {})
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> Response:
        return answer_json({"error": self.message}, self.status, self.headers)


class Behavior:
    """What a fault does with a request, at three moments; by default nothing."""

    def before(self, request: Request, wait: Callable[[float], object]) -> None:
        """Runs before the body is read."""

    def instead(self, request: Request) -> Response | None:
        """An answer that takes the place of the work."""
        return None

    def after(self, response: Response) -> Response:
        """Changes the answer once the work is done."""
        return response


@dataclass(frozen=True)
class Answer(Behavior):
    """Answers `status` and does nothing."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)

    def instead(self, request: Request) -> Response:
        message = "put in by the test"
        return answer_json({"error": message}, self.status, {"X-Error-Message": message, **self.headers})


@dataclass(frozen=True)
class Cut(Behavior):
    """Cuts the connection.

    Args:
        when (`str`): `"before"` anything of the body is read, half-way through the `"request"`, after the work was
            done but before the `"answer"`, or half-way through the `"content"` that is downloaded.
    """

    when: Literal["before", "request", "answer", "content"]

    def before(self, request: Request, wait: Callable[[float], object]) -> None:
        if self.when == "request":
            request.read(request.length // 2)
        if self.when in ("before", "request"):
            raise Disconnected

    def after(self, response: Response) -> Response:
        if self.when == "answer":
            raise Disconnected
        if self.when == "content":
            response.stop_after = response.content_length // 2
        return response


@dataclass(frozen=True)
class Slow(Behavior):
    """Waits before it does anything; with `drip`, sends so many bytes at once and waits in between."""

    seconds: float
    drip: int | None = None

    def before(self, request: Request, wait: Callable[[float], object]) -> None:
        if self.drip is None:
            wait(self.seconds)

    def after(self, response: Response) -> Response:
        if self.drip is not None:
            response.drip = (self.drip, self.seconds)
        return response


@dataclass(frozen=True)
class Truncate(Behavior):
    """Sends only the first bytes of what is downloaded.

    Args:
        keep (`int`): How many.
        consistent (`bool`, *optional*, defaults to `False`): Whether the length in the header is what is sent, as if
            the storage held a shorter file, or the true one, as if the connection ended too early.
    """

    keep: int
    consistent: bool = False

    def after(self, response: Response) -> Response:
        kept = min(self.keep, response.content_length)
        if self.consistent:
            response.length = kept
        else:
            response.stop_after = kept
        return response


@dataclass(frozen=True)
class Corrupt(Behavior):
    """Flips a bit of what is downloaded, in the byte at `place`; the length stays."""

    place: int = 0

    def after(self, response: Response) -> Response:
        response.body = with_flipped_bit(response.body, self.place)
        return response


def with_flipped_bit(content: bytes, place: int) -> bytes:
    if place >= len(content):
        return content
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@dataclass(frozen=True)
class Damage(Behavior):
    """Stores an upload wrong, so that its hash is not the one that was announced."""

    def before(self, request: Request, wait: Callable[[float], object]) -> None:
        request.damaged = True


@dataclass(frozen=True)
class Call(Behavior):
    """Calls a function before the request is handled: to commit in parallel, say."""

    hook: Callable[[], object]

    def before(self, request: Request, wait: Callable[[float], object]) -> None:
        self.hook()


@dataclass
class Fault:
    """A behavior, and the requests that it waits for.

    Args:
        method (`str`): Such as `"POST"`; `"*"` for any.
        path (`str`): Regular expression that is searched in the path (quoted as it was sent, without the query).
        behavior ([`Behavior`]): [`Answer`], [`Cut`], [`Slow`], [`Truncate`], [`Corrupt`], [`Damage`] or [`Call`].
        times (`int`, *optional*, defaults to `1`): How many requests it meets.
        skip (`int`, *optional*, defaults to `0`): How many matching requests pass before.
    """

    method: str
    path: str
    behavior: Behavior
    times: int = 1
    skip: int = 0

    def meets(self, request: Request) -> bool:
        """Whether the fault is for this request; counts it."""
        if self.times <= 0 or self.method not in ("*", request.method) or not re.search(self.path, request.path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True
