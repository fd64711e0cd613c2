"""`TargetStore`: targets of a whole dataset on disk, named after all they depend on, filled by one or more processes."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from ..concept import Concept
from ..files import write_json
from .target_files import Shard, TargetLayout, is_whole, write_shard
from .tokens import text_ids


_ROWS_AT_ONCE = 1000


def target_key(ingredients: Mapping[str, Any]) -> str:
    """SHA-256 of what the targets depend on.

    Args:
        ingredients (`Mapping[str, Any]`): Whatever JSON can hold, in any order.
    """
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def rows_digest(dataset: Dataset, columns: Sequence[str]) -> str:
    """SHA-256 over columns of token ids (lists), numbers or strings of a tokenised dataset, in the order of its rows.

    Args:
        dataset (`Dataset`): Tokenised rows.
        columns (`Sequence[str]`): Columns that are read, lists of lists among them.
    """
    digest = hashlib.sha256(f"{len(dataset)} {sorted(columns)}".encode())
    selected = dataset.select_columns(sorted(columns)).with_format("arrow")
    for table in selected.iter(_ROWS_AT_ONCE):
        for name in table.column_names:
            column = table[name].combine_chunks()
            if not pa.types.is_nested(column.type) or pa.types.is_nested(column.type.value_type):
                digest.update(json.dumps(column.to_pylist()).encode())
                continue
            # As 8 bytes each, whatever type the ids are kept in. The lengths tell where a row ends.
            lengths, ids = column.value_lengths(), column.flatten()
            for values in (lengths, ids):
                digest.update(np.asarray(values, dtype="<i8").tobytes())
    return digest.hexdigest()


def row_key(row: Mapping[str, Any], columns: Sequence[str]) -> int:
    """64 bits of the hash of what a tokenised row holds in some columns, lists of token ids or numbers.

    Args:
        row (`Mapping[str, Any]`): A row as a dataset gives it.
        columns (`Sequence[str]`): Columns that are read.
    """
    return int.from_bytes(hashlib.blake2b(repr([row[name] for name in columns]).encode(), digest_size=8).digest())


def contexts_digest(
    concepts: Mapping[str, Concept], processing_class: PreTrainedTokenizerBase, contexts_per_sample: int, seed: int
) -> str:
    """SHA-256 over the tokens of all contexts, and over what decides which of them a row draws.

    Args:
        concepts (`Mapping[str, Concept]`): Concepts by name.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        contexts_per_sample (`int`): Contexts drawn for a text.
        seed (`int`): Seed of the draw.
    """
    tokens = {
        name: [
            [text_ids(processing_class, context + "\n") for context in contexts]
            for contexts in (concept.expert_contexts, concept.novice_contexts)
        ]
        for name, concept in concepts.items()
    }
    drawn = [tokens, contexts_per_sample, seed, processing_class.bos_token_id]
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


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


SHARD_ROWS = 128
DESCRIPTION_FILE = "targets.json"
# Files that a process keeps mapped. More would only cost address space and handles: opening one takes less than 1 ms.
_OPEN_SHARDS = 32


class TargetStore(Sequence[Mapping[str, torch.Tensor]]):
    """Targets of the rows of a dataset, in safetensors files of 128 rows each.

    Rows are read one by one from files mapped into memory, also by the workers of a `DataLoader`: what is held does not
    grow with the dataset. A store is filled by [`fill_store`], and can be read as soon as none of its files is missing.

    Args:
        folder (`Path`): Folder of the store.
        rows (`int`): Rows of the dataset.
        layout ([`TargetLayout`]): What is kept for each.
    """

    def __init__(self, folder: Path, rows: int, layout: TargetLayout):
        self.folder, self.layout, self._rows = Path(folder), layout, rows
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return self._rows

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self._rows // SHARD_ROWS)

    def rows_of(self, shard: int) -> range:
        """The rows that a file holds."""
        return range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, self._rows))

    def path_of(self, shard: int) -> Path:
        """The name of a file."""
        return self.folder / f"shard-{shard:06d}.safetensors"

    def is_whole(self, shard: int) -> bool:
        """Whether a file is there and undamaged. Every byte of it is read."""
        return is_whole(self.path_of(shard), len(self.rows_of(shard)), self.layout)

    def absent(self) -> list[int]:
        """The files that are not there, damaged ones aside."""
        # Listing asks a network drive anew, where looking for a name may find the answer of an earlier look.
        found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return [shard for shard in range(self.shards) if self.path_of(shard).name not in found]

    def describe(self, ingredients: Mapping[str, Any]) -> None:
        """Make the folder, and write down for people what is in it: `targets.json` with layout, counts and key."""
        description = {
            "rows": self._rows,
            "shard_rows": SHARD_ROWS,
            "layout": self.layout.to_json(),
            "key": ingredients,
        }
        write_json(self.folder / DESCRIPTION_FILE, description)

    @overload
    def __getitem__(self, row: int) -> dict[str, torch.Tensor]: ...
    @overload
    def __getitem__(self, row: slice) -> list[Mapping[str, torch.Tensor]]: ...
    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(self._rows))]
        if not -self._rows <= row < self._rows:
            raise IndexError(f"Row {row} is asked for, but targets are stored for {self._rows}.")
        number, place = divmod(row % self._rows, SHARD_ROWS)
        shard = self._open.pop(number, None) or Shard(self.path_of(number), self.layout)
        self._open[number] = shard
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard[place]

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files belong to a process: a worker opens its own.
        return self.__dict__ | {"_open": OrderedDict()}


class RowTargets:
    """The targets of a store by what a row holds, so that rows may be shuffled, chosen or joined after they were stored.

    Args:
        store ([`TargetStore`]): Targets of the rows, by number.
        columns (`Sequence[str]`): The columns on which the targets depend.
        rows (`Iterable[Mapping]`): The rows, in the order of the store.
    """

    def __init__(self, store: TargetStore, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]):
        self.store, self._columns = store, tuple(columns)
        keys = np.fromiter((row_key(row, self._columns) for row in rows), dtype=np.uint64, count=len(store))
        # Sixteen bytes a row, where a dictionary would take two hundred.
        self._numbers = np.argsort(keys, kind="stable")
        self._keys = keys[self._numbers]

    def __getitem__(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Raises `ValueError` for a row whose targets were not stored."""
        key = np.uint64(row_key(row, self._columns))
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            raise ValueError(
                "The training rows are others than those whose targets were stored when the trainer was made: give the "
                "dataset to a new trainer."
            )
        return self.store[int(self._numbers[place])]


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
