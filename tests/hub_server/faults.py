"""What can go wrong on the way, put in on purpose: a fault waits for requests that match it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .messages import Disconnected, Request, Response, answer_json


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
    """Answers `status` and does nothing.

    Args:
        status (`int`): Such as 401, 403, 409, 412, 429, 500, 503.
        headers (`Mapping[str, str]`, *optional*): Such as `{"Retry-After": "1"}`.
        message (`str`, *optional*, defaults to `"put in by the test"`): The error's text.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "put in by the test"

    def instead(self, request: Request) -> Response:
        return answer_json({"error": self.message}, self.status, {"X-Error-Message": self.message, **self.headers})


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
    """Waits before it does anything, or drips the content.

    Args:
        seconds (`float`): How long, once or between two drips.
        drip (`int`, *optional*): Bytes of a drip; by default the content is sent at once.
    """

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
    """Flips a bit of what is downloaded; the length stays.

    Args:
        place (`int`, *optional*, defaults to `0`): Byte of the file.
    """

    place: int = 0

    def after(self, response: Response) -> Response:
        response.flipped = self.place
        return response


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
