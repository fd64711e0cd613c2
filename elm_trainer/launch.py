"""The processes of a launch: how many there are, and what the first of them does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch


Result = TypeVar("Result")


def place() -> tuple[int, int]:
    """Number of processes of the launch, and which of them this is; 1 and 0 without a launch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


def from_first(value: Result) -> Result:
    """The value that the first process gave. All processes must call this; without a launch it is the value itself."""
    if place()[0] == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def on_first(work: Callable[[], Result]) -> Result:
    """What the first process makes, in all of them; what it raises is raised in all, so that nobody waits for it.

    All processes must call this.
    """
    made: Any = None
    failure: Exception | None = None
    if place()[1] == 0:
        try:
            made = work()
        except Exception as error:
            failure = error
    made, failure = from_first((made, failure))
    if failure is not None:
        raise failure
    return made
