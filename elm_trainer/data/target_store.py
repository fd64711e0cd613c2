"""`TargetStore`: the targets of a whole dataset in a folder, as the collator reads them."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from ..files import write_json
from .target_key import row_key
from .target_layout import TargetLayout
from .target_shard import Shard, is_whole


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
