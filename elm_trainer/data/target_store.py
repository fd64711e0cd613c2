"""`TargetStore`: targets of a whole dataset on disk, named after all they depend on, filled by one or more processes."""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import UNFINISHED, discard, replacing, write_json


# To be raised whenever files written before can no longer be read as what they were.
FORMAT_VERSION = 1
SHARD_ROWS = 128
DESCRIPTION_FILE = "targets.json"
# Above this, a store takes longer to write and read than it spares.
LARGEST_STORE = 64 * 2**30
# Files that a process keeps mapped. More would only cost address space and handles: opening one takes less than 1 ms.
_OPEN_SHARDS = 32
_OFFSETS, _OFFSET_BYTES = ".offsets", 4
_CHECKSUM = "crc32"
# A probability has 6 bits of exponent and 18 of mantissa, those of float32 shifted: exponent 63 stands for [1, 2).
_PROB_BYTES = 3
_MANTISSA_CUT = 23 - 18
_EXPONENT_SHIFT = (127 - 63) << 23
_NOT_FINITE = "the model's logits are not finite. Load it in float32, or set `bf16` in place of `fp16`."


def encode_probs(probs: torch.Tensor) -> torch.Tensor:
    """Probabilities in 24 bits each, uint8 `[..., 3]`, least byte first; raises `FloatingPointError` for anything else.

    The relative error is at most `2^-19`; 0 and 1 are exact, and what is at most `2^-63` becomes 0. (float16 would be off
    by `2^-11`, which moves a loss by more than 1e-4.)
    """
    probs = probs.float().contiguous()
    if not bool(((probs >= 0) & (probs < 2)).all()):
        raise FloatingPointError(f"A target holds probabilities that are NaN or outside of [0, 1]: {_NOT_FINITE}")
    bits = probs.view(torch.int32)
    half = (1 << (_MANTISSA_CUT - 1)) - 1
    # To nearest, ties to even. A carry out of the mantissa raises the exponent, as it should.
    codes = (bits - _EXPONENT_SHIFT + half + ((bits >> _MANTISSA_CUT) & 1)) >> _MANTISSA_CUT
    return _to_bytes(codes.clamp(0, (1 << 24) - 1))


def decode_probs(packed: torch.Tensor) -> torch.Tensor:
    """The float32 values, `[...]`, of codes `[..., 3]`."""
    codes = _from_bytes(packed)
    return torch.where(codes == 0, 0, (codes << _MANTISSA_CUT) + _EXPONENT_SHIFT).view(torch.float32)


def encode_floats(values: torch.Tensor) -> torch.Tensor:
    """Values as they are, in float32. Raises `FloatingPointError` if one is NaN or infinite."""
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"A target holds values that are NaN or infinite: {_NOT_FINITE}")
    return values.float()


def encode_states(values: torch.Tensor) -> torch.Tensor:
    """Hidden states `[..., width]` in float16, `[..., width + 1]`: the last is the power of two that the others are divided by.

    It is 0 up to 65,504, the largest float16, which the first token of a text exceeds in some models (98,538 in layer 12 of
    Gemma 3 270M). Raises `FloatingPointError` if a value is NaN or infinite.
    """
    values = encode_floats(values)
    power = (values.abs().amax(-1, keepdim=True) / torch.finfo(torch.float16).max).clamp(min=1).log2().ceil()
    return torch.cat([values / power.exp2(), power], -1).half()


def decode_states(stored: torch.Tensor) -> torch.Tensor:
    """The states in float32, `[..., width]`."""
    return stored[..., :-1].float() * stored[..., -1:].float().exp2()


def id_bytes(vocab_size: int) -> int:
    """Bytes that a token id takes: 2 where the vocabulary has at most 65,536 tokens, else 3, for up to `2^24` tokens."""
    if vocab_size > 1 << 24:
        raise ValueError(f"`vocab_size` is {vocab_size}, but ids are stored in 3 bytes: up to {1 << 24} tokens.")
    return 2 if vocab_size <= 1 << 16 else 3


def encode_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Token ids as uint16 `[...]`, or where the vocabulary does not fit as uint8 `[..., 3]`, least byte first."""
    if not bool(((ids >= 0) & (ids < vocab_size)).all()):
        raise ValueError(
            f"A target names token ids from {int(ids.min())} to {int(ids.max())}, but there are {vocab_size}."
        )
    return ids.to(torch.uint16) if id_bytes(vocab_size) == 2 else _to_bytes(ids.int())


def decode_ids(packed: torch.Tensor) -> torch.Tensor:
    """The ids in int64, `[...]`."""
    return packed.long() if packed.dtype == torch.uint16 else _from_bytes(packed).long()


def _to_bytes(values: torch.Tensor) -> torch.Tensor:
    """The three lowest bytes of int32 values, uint8 `[..., 3]`, the same on every machine."""
    return torch.stack([(values >> shift) & 0xFF for shift in (0, 8, 16)], -1).to(torch.uint8)


def _from_bytes(packed: torch.Tensor) -> torch.Tensor:
    low, middle, high = packed.int().unbind(-1)
    return low | middle << 8 | high << 16


class Field(NamedTuple):
    """One kind of value of a text: token ids, probabilities in 3 bytes, floats in float32, or states in float16."""

    kind: Literal["ids", "probs", "floats", "states"]
    width: int | None = None  # values to an item; without it one value without that dimension
    per: Literal["position", "text"] = "position"  # an item for each supervised position, or for the text


@dataclass(frozen=True)
class TargetLayout:
    """The fields of a store by the names that [`ElmDataCollator`] reads: `<sub-batch>_<key>`, e.g. `forget_probs`.

    A supervised position of ELM's forget text takes `top_k · (2 + 3) + 4` bytes, one of retain text `top_k · (2 + 3)`:
    with the default `top_k` of 50 that is 254 and 250 bytes per token. A vocabulary of more than 65,536 tokens takes 3
    bytes for an id in place of 2, so 304 and 300. To that come 4 bytes per text and field.
    """

    fields: Mapping[str, Field]
    vocab_size: int

    def item_bytes(self, name: str) -> int:
        """Bytes of a field's values at one position (or of one text)."""
        field = self.fields[name]
        if field.kind == "states":
            return 2 * ((field.width or 0) + 1)
        value = {"ids": id_bytes(self.vocab_size), "probs": _PROB_BYTES, "floats": 4}[field.kind]
        return value * (1 if field.width is None else field.width)

    def total_bytes(self, positions: Mapping[str, int], texts: int) -> int:
        """Bytes of a store of so many texts, whose supervised positions are counted by sub-batch, without file headers."""
        total = 0
        for name, field in self.fields.items():
            items = texts if field.per == "text" else positions[name.partition("_")[0]]
            total += items * self.item_bytes(name) + texts * _OFFSET_BYTES
        return total

    def encode(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values `[items]` or `[items, width]` of a field as they are stored."""
        kind, width, _ = self.fields[name]
        shape = () if width is None else (width,)
        if tuple(values.shape[1:]) != shape:
            raise ValueError(f"`{name}` has the shape {tuple(values.shape)}: after the first, {shape} is stored.")
        if kind == "ids":
            return encode_ids(values, self.vocab_size)
        return {"probs": encode_probs, "floats": encode_floats, "states": encode_states}[kind](values)

    def decode(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The values of a field, in new memory: ids in int64, the rest in float32."""
        decoders = {"ids": decode_ids, "probs": decode_probs, "floats": torch.clone, "states": decode_states}
        return decoders[self.fields[name].kind](stored)

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON holds it."""
        fields = {name: list(field) for name, field in sorted(self.fields.items())}
        return {"format": FORMAT_VERSION, "vocab_size": self.vocab_size, "fields": fields}


class TargetStore(Sequence[Mapping[str, torch.Tensor]]):
    """Targets of the rows of a dataset, in safetensors files of 128 rows each.

    Rows are read one by one from files mapped into memory, also by the workers of a `DataLoader`: what is held does not
    grow with the dataset. A store is filled by [`fill_store`], and can be read as soon as none of its files is missing.
    """

    def __init__(self, folder: Path, rows: int, layout: TargetLayout):
        self.folder, self.layout, self._rows = Path(folder), layout, rows
        # Of each open file, the one read last at the end: the bounds of rows in a field, and its mapped values.
        self._open: dict[int, dict[str, tuple[list[int], Any]]] = {}

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
        """Whether a file holds its rows in this layout, byte for byte as they were written. All of it is read."""
        try:
            with safe_open(self.path_of(shard), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                checksum = (file.metadata() or {}).get(_CHECKSUM)
        except (OSError, SafetensorError):
            return False
        if set(tensors) != {name + suffix for name in self.layout.fields for suffix in ("", _OFFSETS)}:
            return False
        bounds = {tensors[name + _OFFSETS].numel() for name in self.layout.fields}
        return checksum == _checksum(tensors) and bounds == {len(self.rows_of(shard)) + 1}

    def absent(self) -> list[int]:
        """The files that are not there, damaged ones aside."""
        # Listing asks a network drive anew, where looking for a name may find the answer of an earlier look.
        found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return [shard for shard in range(self.shards) if self.path_of(shard).name not in found]

    def describe(self, ingredients: Mapping[str, Any]) -> None:
        """Make the folder, and write down for people what is in it: `targets.json` with layout, counts and key."""
        described = {"rows": self._rows, "shard_rows": SHARD_ROWS, "layout": self.layout.to_json(), "key": ingredients}
        write_json(self.folder / DESCRIPTION_FILE, described)

    def write(self, shard: int, rows: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Write a file of rows, each with the values of every field, `[items, ...]`, on the CPU.

        The file has its name only once it is whole. Whoever calls this holds its lock.
        """
        path, tensors = self.path_of(shard), {}
        for name in self.layout.fields:
            counts = torch.tensor([0] + [row[name].size(0) for row in rows])
            tensors[name] = self.layout.encode(name, torch.cat([row[name] for row in rows])).contiguous()
            tensors[name + _OFFSETS] = counts.cumsum(0).to(torch.int32)
        # What a killed run left of this file, also one of an earlier version.
        for pattern in (f"{UNFINISHED}{path.stem}-*", f"{path.stem}.*.tmp"):
            for leftover in self.folder.glob(pattern):
                discard(leftover)
        with replacing(path) as unfinished:
            save_file(tensors, unfinished, metadata={_CHECKSUM: _checksum(tensors)})

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(self._rows))]
        if not -self._rows <= row < self._rows:
            raise IndexError(f"Row {row} is asked for, but targets are stored for {self._rows}.")
        shard, place = divmod(row % self._rows, SHARD_ROWS)
        opened = self._open.pop(shard, None)
        self._open[shard] = self._map(shard) if opened is None else opened
        if len(self._open) > _OPEN_SHARDS:
            del self._open[next(iter(self._open))]
        return {
            name: self.layout.decode(name, stored[bounds[place] : bounds[place + 1]])
            for name, (bounds, stored) in self._open[shard].items()
        }

    def _map(self, shard: int) -> dict[str, tuple[list[int], Any]]:
        """Map a file into memory, so that a row costs its own bytes only."""
        path = self.path_of(shard)
        try:
            file = safe_open(path, "pt")
            return {
                name: (file.get_tensor(name + _OFFSETS).tolist(), file.get_slice(name)) for name in self.layout.fields
            }
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The stored targets {path} are damaged ({error}): delete the file and start again."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files belong to a process: a worker opens its own.
        return self.__dict__ | {"_open": {}}


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(f"{name} {tuple(tensors[name].shape)}".encode(), checksum)
        checksum = zlib.crc32(tensors[name].view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"


def fill_store(
    store: TargetStore, shards: Sequence[int], compute: Callable[[range], Sequence[Mapping[str, torch.Tensor]]]
) -> None:
    """Compute and write files of a store, skipping those that are whole.

    Several runs may do this at once, in any number of processes: each file has a lock, so that it is made once. Where
    locks do not hold, as on some network drives, two make the same file, and the later one replaces the earlier. A run
    that was killed continues after its last whole file.

    Args:
        store: Store, whose folder exists.
        shards: Numbers of the files.
        compute: Makes what is stored for each row of a range, on the CPU.

    Raises:
        OSError: if a file can't be written, as on a full disk. Those that are finished stay.
    """

    def make(shard: int, timeout: float) -> bool:
        try:
            with FileLock(store.path_of(shard).with_suffix(".lock"), timeout=timeout):
                if not store.is_whole(shard):
                    store.write(shard, compute(store.rows_of(shard)))
        except Timeout:
            return False
        return True

    taken = [shard for shard in shards if not make(shard, timeout=0)]
    # Another run has begun these: it finishes them, or it is killed, and then they are made here.
    for shard in taken:
        make(shard, timeout=-1)


def remove_locks(store: TargetStore) -> None:
    """Delete the locks of a store that is whole. Whoever still waits for one finds its file made."""
    for lock in store.folder.glob("*.lock"):
        lock.unlink(missing_ok=True)


class RowTargets:
    """The targets of a store by what a row holds, so that rows may be shuffled, chosen or joined after they were stored.

    Args:
        store: Targets of the rows, by number.
        columns: The columns on which the targets depend.
        rows: The rows, in the order of the store.
    """

    def __init__(self, store: TargetStore, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]):
        self.store, self._columns = store, tuple(columns)
        keys = np.fromiter(map(self._key, rows), dtype=np.uint64, count=len(store))
        # Sixteen bytes a row, where a dictionary would take two hundred.
        self._numbers = np.argsort(keys, kind="stable")
        self._keys = keys[self._numbers]

    def __getitem__(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Raises `ValueError` for a row whose targets were not stored."""
        key = np.uint64(self._key(row))
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            raise ValueError(
                "The training rows are others than those whose targets were stored when the trainer was made: give the "
                "dataset to a new trainer."
            )
        return self.store[int(self._numbers[place])]

    def _key(self, row: Mapping[str, Any]) -> int:
        values = repr([row[name] for name in self._columns])
        return int.from_bytes(hashlib.blake2b(values.encode(), digest_size=8).digest())


def reason_against(*, rows: int, visits: float, needed: int, missing: int, free: int) -> str | None:
    """Why targets had better not be stored before training; `None` where each row is visited and the store has room.

    A row that is visited costs its targets either way, once when they are stored and at every visit when they are not.
    Only rows that are never visited make the store cost more than it spares. `visits` counts the rows that training
    reads, with repetitions. In bytes, the store takes `needed`, of which `missing` are still to be written where `free`
    are free.
    """
    if visits < rows:
        return f"training visits {visits:g} of {rows} rows"
    if needed > LARGEST_STORE:
        return f"they would take {_gib(needed)}, more than {_gib(LARGEST_STORE)}"
    if 2 * missing > free:
        return f"they would take {_gib(missing)}, more than half of the {_gib(free)} that are free"
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
