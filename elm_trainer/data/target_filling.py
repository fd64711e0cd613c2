"""Make the missing files of a target store, beside whoever else is making them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from filelock import FileLock, Timeout

from .target_shard import write_shard
from .target_store import TargetStore


def fill_store(
    store: TargetStore,
    shards: Sequence[int],
    compute: Callable[[range], Sequence[Mapping[str, torch.Tensor]]],
) -> None:
    """Compute and write files of a store, skipping those that are whole.

    Several runs may do this at once, in any number of processes: a file is made under a lock of its own, so that each
    is made once. Where locks do not hold, as on some network drives, two make the same file, and the later one replaces
    the earlier. A run that was killed goes on after its last whole file.

    Args:
        store ([`TargetStore`]): Store, whose folder exists.
        shards (`Sequence[int]`): Numbers of the files.
        compute (`Callable`): Makes what is stored for each row of a range, on the CPU.

    Raises:
        OSError: if a file can't be written. Those that are finished stay.
    """
    taken = []
    for shard in shards:
        if not _make(store, shard, compute, wait=False):
            taken.append(shard)
    # Another run has begun these: it finishes them, or it is killed, and then they are made here.
    for shard in taken:
        _make(store, shard, compute, wait=True)


def _make(store: TargetStore, shard: int, compute: Callable, *, wait: bool) -> bool:
    """Make one file unless it is whole; `False` if somebody else is making it and `wait` is `False`."""
    path = store.path_of(shard)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return False
    try:
        if not store.is_whole(shard):
            write_shard(path, compute(store.rows_of(shard)), store.layout)
    finally:
        lock.release()
    return True


def remove_locks(store: TargetStore) -> None:
    """Delete the locks of a store that is whole. Whoever still waits for one finds its file made."""
    for lock in store.folder.glob("*.lock"):
        lock.unlink(missing_ok=True)
