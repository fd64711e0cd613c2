"""A request as the routes see it, an answer, and a refusal."""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


COPY_CHUNK = 1 << 20


class Disconnected(Exception):
    """The connection is gone; nothing more is read from it or written to it."""


@dataclass
class Request:
    """What the client asks.

    Args:
        origin (`str`): `"hub"` or `"storage"`: which of the two addresses was called.
        method (`str`): `GET`, `HEAD`, `POST`, `PUT` or `DELETE`.
        target (`str`): Path and query, still quoted.
        headers (`Message`): Names are not case-sensitive.
        length (`int`): Bytes of the body.
        stream (`BufferedIOBase`): Where the body is read from.
        args (`dict[str, str]`): What the route found in the path, unquoted.
        damaged (`bool`): Whether the first byte of the body is to be stored wrong.
    """

    origin: str
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

    def option(self, name: str) -> str | None:
        """The last value of a query parameter."""
        return self.query.get(name, [None])[-1]

    def flag(self, name: str) -> bool:
        return (self.option(name) or "").lower() in ("1", "true")

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
        try:
            return json.loads(self.body() or b"{}")
        except ValueError as error:
            raise Refusal(400, f"The body is not JSON: {error}") from error

    def save(self, path: Path) -> None:
        """Write the body to a file, which exists only once the whole body is there."""
        partial = path.with_suffix(f".{secrets.token_hex(4)}")
        with partial.open("wb") as file:
            while chunk := self.read(COPY_CHUNK):
                if self.damaged and file.tell() == 0:
                    chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
                file.write(chunk)
        partial.replace(path)


@dataclass
class Response:
    """What is answered.

    Args:
        status (`int`, *optional*, defaults to `200`): Status code.
        headers (`dict[str, str]`, *optional*): Besides the length.
        body (`bytes`, *optional*): Content, if it is not in a file.
        file (`Path`, *optional*): File that holds the content.
        start, length (`int`, *optional*): The part of the content that is sent: the whole by default.
        stop_after (`int`, *optional*): Bytes of the content after which the connection is cut.
        flipped (`int`, *optional*): Place of a byte that is sent wrong.
        drip (`tuple[int, float]`, *optional*): Bytes sent at once, and seconds in between.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: Path | None = None
    start: int = 0
    length: int | None = None
    stop_after: int | None = None
    flipped: int | None = None
    drip: tuple[int, float] | None = None

    @property
    def size(self) -> int:
        """Bytes of the whole content."""
        return self.file.stat().st_size if self.file else len(self.body)

    @property
    def content_length(self) -> int:
        return self.size - self.start if self.length is None else self.length

    def send(self, write: Callable[[bytes], Any], pause: Callable[[float], Any]) -> None:
        """Write the content with `write`."""
        end = self.start + self.content_length
        stop = end if self.stop_after is None else min(end, self.start + self.stop_after)
        step, seconds = self.drip or (COPY_CHUNK, 0.0)
        for place in range(self.start, stop, step):
            chunk = bytearray(self._content(place, min(step, stop - place)))
            if self.flipped is not None and place <= self.flipped < place + len(chunk):
                chunk[self.flipped - place] ^= 1
            write(bytes(chunk))
            if seconds:
                pause(seconds)
        if stop < end:
            raise Disconnected

    def _content(self, place: int, size: int) -> bytes:
        if self.file is None:
            return self.body[place : place + size]
        with self.file.open("rb") as file:
            file.seek(place)
            return file.read(size)


def answer_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    body = json.dumps(content, default=str).encode()
    return Response(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, body)


class Refusal(Exception):
    """An answer with an error: what the Hub says, and the code by which the client tells its errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: Any):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.content = content
        self.commit: str | None = None

    def response(self) -> Response:
        headers = {"X-Error-Message": " ".join(self.message.split())}
        if self.code:
            headers["X-Error-Code"] = self.code
        if self.commit:
            headers["X-Repo-Commit"] = self.commit
        return answer_json({"error": self.message, **self.content}, self.status, headers)
