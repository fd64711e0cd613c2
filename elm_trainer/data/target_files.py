"""The files of a target store: how token ids and probabilities are encoded, laid out, written and read row by row."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import UNFINISHED, discard, replacing


# An unsigned float of 24 bits: 6 of exponent and 18 of mantissa, which are those of float32 shifted, so that exponent 63
# stands for [1, 2) and code 0 for zero.
PROB_BYTES = 3
_MANTISSA_CUT = 23 - 18
_EXPONENT_SHIFT = (127 - 63) << 23
_NOT_FINITE = "the model's logits are not finite. Load it in float32, or set `bf16` in place of `fp16`."


def encode_probs(probs: torch.Tensor) -> torch.Tensor:
    """Round probabilities to 24 bits.

    The relative error is at most `2^-19`; 0 and 1 are exact, and what is at most `2^-63` becomes 0. (float16 would be off
    by `2^-11`, which moves a loss by more than 1e-4.)

    Args:
        probs (`torch.Tensor`): Values from 0 to below 2, in float32, any shape.

    Returns:
        `torch.Tensor`: their codes in uint8, `[..., 3]`, least byte first.

    Raises:
        FloatingPointError: if a value is NaN, negative or 2 and more.
    """
    probs = probs.float().contiguous()
    if not bool(((probs >= 0) & (probs < 2)).all()):
        raise FloatingPointError(f"A target holds probabilities that are NaN or outside of [0, 1]: {_NOT_FINITE}")
    bits = probs.view(torch.int32)
    half = (1 << (_MANTISSA_CUT - 1)) - 1
    # To nearest, ties to even. A carry out of the mantissa raises the exponent, as it should.
    codes = (bits - _EXPONENT_SHIFT + half + ((bits >> _MANTISSA_CUT) & 1)) >> _MANTISSA_CUT
    return _to_bytes(codes.clamp(0, (1 << 24) - 1), PROB_BYTES)


def decode_probs(packed: torch.Tensor) -> torch.Tensor:
    """The float32 values, `[...]`, of codes `[..., 3]`."""
    codes = _from_bytes(packed)
    bits = torch.where(codes == 0, 0, (codes << _MANTISSA_CUT) + _EXPONENT_SHIFT)
    return bits.view(torch.float32)


def encode_floats(values: torch.Tensor) -> torch.Tensor:
    """Values as they are, in float32.

    Raises:
        FloatingPointError: if a value is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"A target holds values that are NaN or infinite: {_NOT_FINITE}")
    return values.float()


def id_bytes(vocab_size: int) -> int:
    """Bytes that a token id takes: 2 where the vocabulary has at most 65,536 tokens, else 3.

    Raises:
        ValueError: for more than `2^24` tokens.
    """
    if vocab_size > 1 << 24:
        raise ValueError(
            f"`vocab_size` is {vocab_size}, but ids are stored in at most 3 bytes: up to {1 << 24} tokens."
        )
    return 2 if vocab_size <= 1 << 16 else 3


def encode_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Token ids as uint16 `[...]`, or where the vocabulary does not fit as uint8 `[..., 3]`, least byte first.

    Raises:
        ValueError: if an id is no token of the vocabulary.
    """
    if not bool(((ids >= 0) & (ids < vocab_size)).all()):
        raise ValueError(
            f"A target names token ids from {int(ids.min())} to {int(ids.max())}, but there are {vocab_size}."
        )
    return ids.to(torch.uint16) if id_bytes(vocab_size) == 2 else _to_bytes(ids.int(), 3)


def decode_ids(packed: torch.Tensor) -> torch.Tensor:
    """The ids in int64, `[...]`."""
    return packed.long() if packed.dtype == torch.uint16 else _from_bytes(packed).long()


def _to_bytes(values: torch.Tensor, count: int) -> torch.Tensor:
    """The lowest bytes of int32 values, uint8 `[..., count]`, the same on every machine."""
    return torch.stack([(values >> (8 * place)) & 0xFF for place in range(count)], -1).to(torch.uint8)


def _from_bytes(packed: torch.Tensor) -> torch.Tensor:
    values = packed[..., 0].int()
    for place in range(1, packed.size(-1)):
        values |= packed[..., place].int() << (8 * place)
    return values


# Raised whenever files written before can no longer be read as what they were.
FORMAT_VERSION = 1
OFFSET_BYTES = 4


class Field(NamedTuple):
    """One kind of value of a text.

    Attributes:
        kind (`str`): `"ids"` of tokens, `"probs"` in 3 bytes, `"floats"` in float32, or `"halves"` in float16.
        width (`int`, *optional*): Values to a position; `None` for one without a dimension of its own.
        per (`str`, *optional*, defaults to `"position"`): Whether there is one for each supervised `"position"` or one
            for the `"text"`.
    """

    kind: Literal["ids", "probs", "floats", "halves"]
    width: int | None = None
    per: Literal["position", "text"] = "position"


@dataclass(frozen=True)
class TargetLayout:
    """The fields of a store by the names that [`ElmDataCollator`] reads: `<sub-batch>_<key>`, e.g. `forget_probs`.

    A supervised position of ELM's forget text takes `top_k · (2 + 3) + 4` bytes, one of retain text `top_k · (2 + 3)`:
    with the default `top_k` of 50 that is 254 and 250 bytes per token. A vocabulary of more than 65,536 tokens takes 3
    bytes for an id in place of 2, so 304 and 300. To that come 4 bytes per text and field. NPO keeps 4 bytes per text
    and these.

    Args:
        fields (`Mapping[str, Field]`): Fields by name.
        vocab_size (`int`): Tokens of the vocabulary.
    """

    fields: Mapping[str, Field]
    vocab_size: int

    def item_bytes(self, name: str) -> int:
        """Bytes of a field's values at one position (or of one text)."""
        field = self.fields[name]
        value = {"ids": id_bytes(self.vocab_size), "probs": PROB_BYTES, "floats": 4, "halves": 2}[field.kind]
        return value * (1 if field.width is None else field.width)

    def total_bytes(self, positions: Mapping[str, int], texts: int) -> int:
        """Bytes of a whole store, but for the headers of its files.

        Args:
            positions (`Mapping[str, int]`): Supervised positions of all texts, by sub-batch.
            texts (`int`): Rows of the store.
        """
        total = 0
        for name, field in self.fields.items():
            items = texts if field.per == "text" else positions[name.partition("_")[0]]
            total += items * self.item_bytes(name) + texts * OFFSET_BYTES
        return total

    def encode(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values `[items]` or `[items, width]` of a field as they are stored."""
        field = self.fields[name]
        shape = () if field.width is None else (field.width,)
        if tuple(values.shape[1:]) != shape:
            raise ValueError(f"`{name}` has the shape {tuple(values.shape)}: after the first, {shape} is stored.")
        if field.kind == "ids":
            return encode_ids(values, self.vocab_size)
        if field.kind == "halves":
            return encode_floats(values.half()).half()
        return encode_probs(values) if field.kind == "probs" else encode_floats(values)

    def decode(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The values of a field: ids in int64, the rest in float32."""
        kind = self.fields[name].kind
        if kind == "ids":
            return decode_ids(stored)
        return decode_probs(stored) if kind == "probs" else stored.float() if kind == "halves" else stored.clone()

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON holds it."""
        return {
            "format": FORMAT_VERSION,
            "vocab_size": self.vocab_size,
            "fields": {name: list(field) for name, field in sorted(self.fields.items())},
        }


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
