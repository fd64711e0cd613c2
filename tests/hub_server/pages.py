"""Lists that come in pages, linked as GitHub links them."""

from collections.abc import Sequence
from datetime import datetime
from typing import TypeVar
from urllib.parse import urlencode

from .messages import Request
from .state import State


T = TypeVar("T")


def page_of(state: State, request: Request, items: Sequence[T], most: int) -> tuple[Sequence[T], dict[str, str]]:
    """The page of `items` that was asked for, and the header that points to the next one."""
    size = min(most, state.page_size)
    start = int(request.option("cursor") or 0)
    end = start + size
    if end >= len(items):
        return items[start:end], {}
    query = urlencode(request.query | {"cursor": [str(end)]}, doseq=True)
    return items[start:end], {"Link": f'<{state.endpoint}{request.path}?{query}>; rel="next"'}


def timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
