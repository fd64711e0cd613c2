"""Whether targets are computed once before training, or anew in each step."""

from typing import NamedTuple


# Above this, a store takes longer to write and read than it spares.
LARGEST_STORE = 64 * 2**30


class Choice(NamedTuple):
    """A decision and why.

    Attributes:
        precompute (`bool`): Whether targets are computed before training.
        reason (`str`): For the log.
    """

    precompute: bool
    reason: str


def choose(*, rows: int, visits: float, needed: int, missing: int, free: int) -> Choice:
    """Compute targets before training where each row is visited at least once and the store has room.

    A row that is visited costs its targets either way, once when they are stored and at every visit when they are not.
    Only rows that are never visited make the store cost more than it spares.

    Args:
        rows (`int`): Rows of the dataset.
        visits (`float`): Rows that training reads, repetitions counted.
        needed (`int`): Bytes of the whole store.
        missing (`int`): Bytes of it that are still to be written.
        free (`int`): Bytes that are free on its disk.
    """
    if visits < rows:
        return Choice(False, f"training visits {visits:g} of {rows} rows")
    if needed > LARGEST_STORE:
        return Choice(False, f"they would take {_gib(needed)}, more than {_gib(LARGEST_STORE)}")
    if 2 * missing > free:
        return Choice(False, f"they would take {_gib(missing)}, more than half of the {_gib(free)} that are free")
    return Choice(True, f"training visits {visits:g} times one of {rows} rows, and they take {_gib(needed)}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
