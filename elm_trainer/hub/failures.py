"""Network failures, turned into errors that say what to do."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import get_session
from transformers.utils import logging

from .errors import ConflictError, HubError, NotSignedInError, PermissionDeniedError, UploadError


logger = logging.get_logger(__name__)
ATTEMPTS = 4
# Commits of large repositories take the Hub a while; a connection that is silent for longer is given up.
SILENCE_SECONDS = 120.0
_PASSING = (408, 429, 500, 502, 503, 504)
Result = TypeVar("Result")


@contextmanager
def patience() -> Iterator[None]:
    """Give up connections that stay silent for `SILENCE_SECONDS`; the client alone would wait for ever."""
    client = get_session()
    before = client.timeout
    client.timeout = httpx2.Timeout(SILENCE_SECONDS)
    try:
        yield
    finally:
        client.timeout = before


@contextmanager
def named_errors(repo_id: str, doing: str) -> Iterator[None]:
    """Raise the failures of the client as the named errors of this package.

    Args:
        repo_id (`str`): Repository at hand.
        doing (`str`): What was tried, as in "Committing to org/name".
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise NotSignedInError(f"{doing} needs a token: run `hf auth login`, or set HF_TOKEN.") from error
    except (HfHubHTTPError, httpx2.TransportError) as error:
        raise _named(error, repo_id, doing) from error


def passing(error: Exception) -> bool:
    """Whether a failure may be over by the next attempt: no connection, no answer, too many requests, server errors."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in _PASSING
    return isinstance(error, httpx2.TransportError)


def wait_before(attempt: int, error: Exception) -> None:
    """Wait as long as the Hub asks for (`Retry-After`), else ½, 1, 2 … seconds."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    seconds = float(asked) if asked.isdigit() else 2.0 ** (attempt - 1)
    logger.warning(f"{_first_line(error)}: trying again in {seconds:g} s.")
    time.sleep(seconds)


def retried(call: Callable[[], Result]) -> Result:
    """Call again after failures that pass. Only for calls that may be made twice."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except (HfHubHTTPError, httpx2.TransportError) as error:
            if not passing(error):
                raise
            wait_before(attempt, error)
    return call()


def _named(error: HfHubHTTPError | httpx2.TransportError, repo_id: str, doing: str) -> HubError:
    said = _first_line(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
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
    if passing(error):
        return UploadError(
            f"{doing}: the Hub could not be reached or failed {ATTEMPTS} times ({said}). What it held before is "
            "unchanged: publish again."
        )
    return HubError(f"{doing}: {said}")


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
