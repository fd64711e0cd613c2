"""Pack texts of unlike length into rows without padding, several texts to a row."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Packing(NamedTuple):
    """How the rows of padded sub-batches lie in packed rows.

    Attributes:
        tokens (`torch.Tensor`): For each packed slot, its token's index in the flattened sub-batches, `[rows, width]`.
        position_ids (`torch.Tensor`): Positions that start anew at each text, `[rows, width]`.
        slots (`torch.Tensor`): For each index in the flattened sub-batches, its packed slot, `[tokens]`; 0 for padding.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    slots: torch.Tensor


def pack(lengths: Sequence[int], width: int | None) -> list[list[int]]:
    """First-fit decreasing: the texts of each row, none of which is longer than `width`.

    Args:
        lengths (`Sequence[int]`): Tokens of each text.
        width (`int`, *optional*): Tokens of a row; `None` puts each text into a row of its own.
    """
    if width is None:
        return [[text] for text in range(len(lengths))]
    rows: list[list[int]] = []
    free: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        row = next((row for row, space in enumerate(free) if space >= lengths[text]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(width)
        rows[row].append(text)
        free[row] -= lengths[text]
    return rows


def pack_batches(
    batches: Sequence[Mapping[str, Any]], *, left_padded: bool, one_row: bool = False, apart: bool = False
) -> Packing:
    """Plan the packed rows for sub-batches of [`ElmDataCollator`]; made on the CPU, from lengths alone.

    Args:
        batches (`Sequence[Mapping]`): Sub-batches.
        left_padded (`bool`): Whether they are padded on the left.
        one_row (`bool`, *optional*, defaults to `False`): One row for all texts, as flash attention needs it.
        apart (`bool`, *optional*, defaults to `False`): One text to a row, for models that carry a state along a row.
    """
    starts, lengths, total = [], [], 0
    for batch in batches:
        seq = batch["input_ids"].size(1)
        for index, length in enumerate(batch["lengths"]):
            starts.append(total + index * seq + (seq - length if left_padded else 0))
            lengths.append(length)
        total += len(batch["lengths"]) * seq
    rows = pack(lengths, None if apart else sum(lengths) if one_row else max(lengths))
    width = max(sum(lengths[text] for text in row) for row in rows)
    # A gap at the end of a row is a text of its own, whose logits nobody reads.
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    slots = torch.zeros(total, dtype=torch.long)
    for index, row in enumerate(rows):
        place = 0
        for text in row:
            span, start = lengths[text], starts[text]
            tokens[index, place : place + span] = torch.arange(start, start + span)
            position_ids[index, place : place + span] = torch.arange(span)
            slots[start : start + span] = torch.arange(index * width + place, index * width + place + span)
            place += span
        position_ids[index, place:] = torch.arange(width - place)
    return Packing(tokens, position_ids, slots)
