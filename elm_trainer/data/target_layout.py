"""What a target store holds for each text, and how many bytes that takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from .target_encoding import PROB_BYTES, decode_ids, decode_probs, encode_floats, encode_ids, encode_probs, id_bytes


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
