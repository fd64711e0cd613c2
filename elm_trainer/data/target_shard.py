"""One file of a target store: the targets of some rows, written whole or not at all, read row by row."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import UNFINISHED, discard, replacing
from .target_layout import TargetLayout


_OFFSETS = ".offsets"
_CHECKSUM = "crc32"


def write_shard(path: Path, rows: Sequence[Mapping[str, torch.Tensor]], layout: TargetLayout) -> None:
    """Write the targets of rows to a file, which has its name only once it is whole.

    Args:
        path (`Path`): File, in a folder that exists.
        rows (`Sequence[Mapping[str, torch.Tensor]]`): For each row the values of every field, `[items, ...]`, on the CPU.
        layout ([`TargetLayout`]): Fields and their encoding.

    Raises:
        OSError: if the disk is full or the folder can't be written to.
    """
    tensors = {}
    for name in layout.fields:
        counts = torch.tensor([0] + [row[name].size(0) for row in rows])
        tensors[name] = layout.encode(name, torch.cat([row[name] for row in rows])).contiguous()
        tensors[name + _OFFSETS] = counts.cumsum(0).to(torch.int32)
    # What a killed run left of this file, also one of an earlier version; whoever writes it holds its lock.
    for pattern in (f"{UNFINISHED}{path.stem}-*", f"{path.stem}.*.tmp"):
        for leftover in path.parent.glob(pattern):
            discard(leftover)
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata={_CHECKSUM: _checksum(tensors)})


def is_whole(path: Path, rows: int, layout: TargetLayout) -> bool:
    """Whether a file holds so many rows of this layout, byte for byte as they were written."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            checksum = (file.metadata() or {}).get(_CHECKSUM)
    except (OSError, SafetensorError):
        return False
    if set(tensors) != {name + suffix for name in layout.fields for suffix in ("", _OFFSETS)}:
        return False
    return checksum == _checksum(tensors) and all(
        tensors[name + _OFFSETS].numel() == rows + 1 for name in layout.fields
    )


class Shard:
    """A file of a store, mapped into memory: a row costs its own bytes only.

    Args:
        path (`Path`): File.
        layout ([`TargetLayout`]): Fields and their encoding.

    Raises:
        OSError: if the file is missing or was damaged.
    """

    def __init__(self, path: Path, layout: TargetLayout):
        self._layout = layout
        try:
            self._file = safe_open(path, "pt")
            self._offsets = {name: self._file.get_tensor(name + _OFFSETS).tolist() for name in layout.fields}
            self._slices = {name: self._file.get_slice(name) for name in layout.fields}
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The stored targets {path} are damaged ({error}): delete the file and start again."
            ) from error

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        values = {}
        for name, stored in self._slices.items():
            start, end = self._offsets[name][row : row + 2]
            values[name] = self._layout.decode(name, stored[start:end])
        return values


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(f"{name} {tuple(tensors[name].shape)}".encode(), checksum)
        checksum = zlib.crc32(tensors[name].view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"
