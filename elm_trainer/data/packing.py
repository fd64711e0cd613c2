"""Pack texts of unlike length into rows without padding, several texts to a row."""

import math
from collections.abc import Mapping, Sequence
from heapq import heapreplace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..modeling import evaluating


class Packing(NamedTuple):
    """How the rows of padded sub-batches lie in packed rows.

    Attributes:
        tokens (`torch.Tensor`): For each packed slot, its token's index in the flattened sub-batches, `[rows, width]`.
        position_ids (`torch.Tensor`, *optional*): Positions that start anew at each text, `[rows, width]`; none where each
            has a row of its own, so that the model counts in its own way.
        slots (`torch.Tensor`): For each index in the flattened sub-batches, its packed slot, `[tokens]`; 0 for padding.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor | None
    slots: torch.Tensor


def pack(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Spread texts over rows evenly: the longest first, each into the row that holds least (longest processing time).

    Args:
        lengths (`Sequence[int]`): Tokens of each text.
        rows (`int`): Number of rows.
    """
    filled, texts = [(0, row) for row in range(rows)], [[] for _ in range(rows)]  # type: ignore[var-annotated]
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        held, row = filled[0]
        texts[row].append(text)
        heapreplace(filled, (held + lengths[text], row))
    return texts


def best_rows(lengths: Sequence[int], attention: float) -> list[list[int]]:
    """Spread texts over as many rows as cost least: few and long ones leave no gaps, but every token attends to its row.

    Args:
        lengths (`Sequence[int]`): Tokens of each text.
        attention (`float`): Tokens of a row at which attention costs as much as the matrices.
    """

    def cost(rows: list[list[int]]) -> float:
        width = max(sum(lengths[text] for text in row) for row in rows)
        return len(rows) * width * (1 + width / attention)

    # More rows than keep the longest text alone in its row would only be emptier.
    most = min(len(lengths), -(-2 * sum(lengths) // max(lengths)))
    return min((pack(lengths, rows) for rows in range(1, most + 1)), key=cost)


def pack_batches(
    batches: Sequence[Mapping[str, Any]],
    *,
    left_padded: bool,
    attention: float = math.inf,
    one_row: bool = False,
    apart: bool = False,
    pad_to_multiple_of: int | None = None,
) -> Packing:
    """Plan the packed rows for sub-batches of [`ElmDataCollator`]; made on the CPU, from lengths alone.

    Args:
        batches (`Sequence[Mapping]`): Sub-batches.
        left_padded (`bool`): Whether they are padded on the left.
        attention (`float`, *optional*): Tokens of a row at which attention costs as much as the matrices.
        one_row (`bool`, *optional*, defaults to `False`): One row for all texts, as flash attention needs it.
        apart (`bool`, *optional*, defaults to `False`): One text to a row, for models that carry a state along a row.
        pad_to_multiple_of (`int`, *optional*): What the width of the rows is to be a multiple of.
    """
    starts, lengths, total = [], [], 0
    for batch in batches:
        seq = batch["input_ids"].size(1)
        for index, length in enumerate(batch["lengths"]):
            starts.append(total + index * seq + (seq - length if left_padded else 0))
            lengths.append(length)
        total += len(batch["lengths"]) * seq
    if apart:
        rows = [[text] for text in range(len(lengths))]
    else:
        rows = pack(lengths, 1) if one_row else best_rows(lengths, attention)
    width = max(sum(lengths[text] for text in row) for row in rows)
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
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
    return Packing(tokens, None if apart else position_ids, slots)


def texts_interact(model: nn.Module, first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two texts in one row change each other's logits, although their positions start anew.

    Many architectures keep such texts apart by a mask made from the positions. Others take no notice of positions (biases by
    distance, learned positions counted from the mask) or carry a state or a convolution along the row, and do not say so.

    Args:
        model (`nn.Module`): Causal language model, wrapped or not; run three times on these texts, in evaluation mode.
        first (`Sequence[int]`): Token ids of a text.
        second (`Sequence[int]`): Token ids of another text, as many.
    """
    device = next(model.parameters()).device
    pair = torch.tensor([list(first), list(second)], device=device)
    positions = torch.arange(len(first), device=device)
    with evaluating(model), torch.no_grad():
        alone, rows, packed = (
            model(input_ids=tokens, use_cache=False, **places).logits[-1, -len(first) :].float()
            for tokens, places in (
                (pair[1:], {}),
                (pair, {}),
                (pair.view(1, -1), {"position_ids": positions.repeat(2)[None]}),
            )
        )
    # Rounding differs with the shape of a batch too, by how much depends on the precision and the device.
    rounding = (rows - alone).abs().max()
    return bool((packed - alone).abs().max() > 8 * rounding + 2e-5 * alone.abs().max())
