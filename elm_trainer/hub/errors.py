"""What can go wrong between this machine and the Hub: named errors that say what to do."""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import httpx2
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import get_session
from transformers.utils import logging


class HubError(RuntimeError):
    """Base of the errors of publishing and loading."""


@dataclass(frozen=True)
class Finding:
    """Something that must not be published."""

    file: str  # path in the folder, with `/`
    line: int | None  # from 1; `None` where the whole file is at fault
    what: str  # without repeating the secret
    id: str = ""  # by which `allow` names it: the same while the file and what was found are, whatever the line

    def __str__(self) -> str:
        told = f"{self.file}:{self.line}: {self.what}" if self.line else f"{self.file}: {self.what}"
        return f"{told} [{self.id}]" if self.id else told


class ScanError(HubError):
    """The staged folder holds what must not be published; `findings` names file and line."""

    def __init__(self, message: str, findings: Sequence[Finding]):
        super().__init__(message)
        self.findings = list(findings)


class ReloadError(HubError):
    """The staged adapter does not give the logits of the adapter that was to be published."""


class NotSignedInError(HubError):
    """The Hub asks for a token, or does not know the one it got (401)."""


class PermissionDeniedError(HubError):
    """The token may not write there (403)."""


class ConflictError(HubError):
    """Somebody else changed the repository meanwhile (409, 412)."""


class UploadError(HubError):
    """The Hub could not be reached, or failed, for longer than was waited."""


class UnsafeAdapterError(HubError):
    """An adapter that could run code, write outside its folder, or is not what it says."""


class BaseMismatchError(HubError):
    """The base model is not the one that the adapter was trained on."""


class VerificationError(HubError):
    """The loaded model does not give the answers that were published with it."""


logger = logging.get_logger(__name__)
ATTEMPTS = 4
# Commits of large repositories take the Hub a while; a connection that is silent for longer is given up.
SILENCE_SECONDS = 120.0
# The Hub counts requests over five minutes; whoever is to wait for longer is better told to come back.
LONGEST_WAIT = 300
# 501, 505 and 507 say of the request itself that it will not be served; other server errors may be over soon.
_LASTING = (501, 505, 507)
# What the client makes of an answer that was cut, or comes from something between it and the Hub. It stumbles with a NameError
# over an upload that names a file it did not announce.
UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError, NameError)
# Whoever has the signed URL of a storage may read or write there for a while.
_SIGNED = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]*")
Result = TypeVar("Result")


@contextmanager
def bounded_waits() -> Iterator[None]:
    """Give up connections that stay silent for `SILENCE_SECONDS`, and wait at most `LONGEST_WAIT` where the Hub asks for
    more; the client alone would wait for ever.
    """
    client = get_session()
    before, hooks = client.timeout, client.event_hooks
    client.timeout = httpx2.Timeout(SILENCE_SECONDS)
    client.event_hooks = hooks | {
        "request": [*hooks["request"], _limit_silence],
        "response": [*hooks["response"], _cap_waits],
    }
    try:
        yield
    finally:
        client.timeout, client.event_hooks = before, hooks


@contextmanager
def named_errors(repo_id: str, doing: str) -> Iterator[None]:
    """Bound the waits for the Hub, and raise the failures of the client as the named errors of this package.

    Args:
        doing: What was tried, as in "Committing to org/name".
    """
    try:
        with bounded_waits():
            yield
    except LocalTokenNotFoundError as error:
        raise NotSignedInError(f"{doing} needs a token: run `hf auth login`, or set HF_TOKEN.") from error
    except (HfHubHTTPError, httpx2.TransportError) as error:
        raise _named(error, repo_id, doing) from error


def is_transient(error: Exception) -> bool:
    """Whether a failure of the client may be over by the next attempt: no connection, no answer or one that cannot be read,
    too many requests, server errors.
    """
    if not isinstance(error, HfHubHTTPError):
        return True
    status = error.response.status_code
    return status in (408, 429) or (status >= 500 and status not in _LASTING)


def retried(
    call: Callable[[], Result], done_by: Callable[[Exception], Result | None] = lambda failure: None
) -> Result:
    """Call again after failures that pass, and after answers that cannot be read. Only for calls that may be made twice.

    Args:
        done_by: What a call that failed has done all the same, or `None`; asked before the call is made again.

    Raises:
        UploadError: if the answer still cannot be read.
    """
    attempt = 0
    while True:
        try:
            return call()
        except (HfHubHTTPError, httpx2.TransportError, *UNREADABLE) as caught:
            error = caught
        if (result := done_by(error)) is not None:
            return result
        attempt += 1
        if attempt < ATTEMPTS and is_transient(error):
            _wait_before(attempt, error)
        elif isinstance(error, UNREADABLE):
            raise UploadError(
                f"The Hub's answer was cut, or came from something else ({first_line(error)}): try again, or publish "
                "again later."
            ) from error
        else:
            raise error


def _wait_before(attempt: int, error: Exception) -> None:
    """Before another attempt wait as long as the Hub asks for (`Retry-After`, at most `LONGEST_WAIT`), else ½, 1, 2 … seconds."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    seconds = min(float(asked), LONGEST_WAIT) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", asked) else 2.0 ** (attempt - 2)
    logger.warning(f"{first_line(error)}: trying again in {seconds:g} s.")
    time.sleep(seconds)


def _limit_silence(request: httpx2.Request) -> None:
    """Give a request a limit where the client took it off: it asks for what a repository holds without one."""
    given = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        kind: SILENCE_SECONDS if given.get(kind) is None else given[kind]
        for kind in ("connect", "read", "write", "pool")
    }


def _cap_waits(response: httpx2.Response) -> None:
    """Lower what the Hub asks to wait to `LONGEST_WAIT`: not only `_wait_before` obeys it, the client does by itself."""
    headers = response.headers
    for name, pattern in (("Retry-After", r"()([0-9]+)"), ("RateLimit", r"(.*;t=)([0-9]+)")):
        if name not in headers:
            continue
        if (asked := re.fullmatch(pattern, headers[name].strip())) is None:
            del headers[name]  # a date, which the client ignores, or what it stumbles over
        elif int(asked[2]) > LONGEST_WAIT:
            logger.warning(f"The Hub asks to wait {asked[2]} s: waiting {LONGEST_WAIT} s.")
            headers[name] = f"{asked[1]}{LONGEST_WAIT}"


def _named(error: HfHubHTTPError | httpx2.TransportError, repo_id: str, doing: str) -> HubError:
    said = first_line(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return NotSignedInError(f"{doing}: the Hub does not know the token ({said}): run `hf auth login`.")
    if status == 403:
        return PermissionDeniedError(
            f"{doing}: the token may not do that ({said}): to publish, use a token with the role `write`, or a name of "
            "your own; to load a gated model, ask for access on its page."
        )
    if isinstance(error, RepositoryNotFoundError):
        return PermissionDeniedError(
            f"{doing}: {repo_id} does not exist, or the token may not see it ({said}): check the name and the token."
        )
    if status in (409, 412):
        return ConflictError(
            f"{doing}: somebody changed {repo_id} meanwhile ({said}). Nothing of yours was committed: publish again to "
            "build on what is there now, or use `create_pr=True`."
        )
    if is_transient(error):
        return UploadError(
            f"{doing}: the Hub could not be reached or failed {ATTEMPTS} times ({said}). What it held before is "
            "unchanged: publish again."
        )
    return HubError(f"{doing}: {said}")


def first_line(error: BaseException) -> str:
    """Type and first line of an error, less what signs the URLs in it."""
    lines = [_SIGNED.sub(r"\1?…", line) for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
