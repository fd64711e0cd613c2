"""Host time of laying texts into rows: `packing`."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from elm_trainer.data.packing import PackingPlan, PackingRule, find_packing, pack, pack_batches

from .report import Figure, medians, ratios, seconds_in_turns


ATTENTION = 4 * 576.0  # of SmolLM2-135M
SIZES = (96, 384)


def exhaustive_rows(lengths: Sequence[int], attention: float) -> list[list[int]]:
    """The cheapest of all numbers of rows, each of them tried, as it was done before in every step."""

    def cost(rows: list[list[int]]) -> float:
        width = max(sum(lengths[text] for text in row) for row in rows)
        return len(rows) * width * (1 + width / attention)

    most = min(len(lengths), -(-2 * sum(lengths) // max(lengths)))
    return min((pack(lengths, rows) for rows in range(1, most + 1)), key=cost)


def text_by_text(lengths: Sequence[int], seq: int, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
    """Slots filled one text at a time, as it was done before."""
    width = max(sum(lengths[text] for text in row) for row in rows)
    tokens, position_ids = torch.zeros(2, len(rows), width, dtype=torch.long)
    slots = torch.zeros(len(lengths) * seq, dtype=torch.long)
    for index, row in enumerate(rows):
        place = 0
        for text in row:
            start, span = text * seq, torch.arange(lengths[text])
            end = place + len(span)
            tokens[index, place:end] = start + span
            position_ids[index, place:end] = span
            slots[start : start + len(span)] = index * width + place + span
            place = end
        position_ids[index, place:] = torch.arange(width - place)
    return tokens, position_ids, slots


def measure_packing(repeats: int, threads: int) -> dict[str, Any]:
    """Host seconds of a step for packing 96 and 384 texts of 40 to 200 tokens: before, and now that the collator does it.

    Of the two figures, one is what is left in the step and one the whole work wherever it is done, each over the time before, at
    384 texts.
    """
    torch.set_num_threads(threads)
    seconds: dict[int, dict[str, list[float]]] = {}
    for size in SIZES:
        rng = random.Random(size)
        lengths = [rng.randint(40, 200) for _ in range(size)]
        batch: dict[str, Any] = {"input_ids": torch.zeros(size, 200, dtype=torch.long), "lengths": lengths}
        rule = PackingRule(left_padded=False, attention=ATTENTION)
        packed = dict(batch)
        PackingPlan(rule, [("forget",)]).add({"forget": packed})

        def before(lengths: list[int] = lengths) -> object:
            return text_by_text(lengths, 200, exhaustive_rows(lengths, ATTENTION))

        def step(packed: dict[str, Any] = packed, rule: PackingRule = rule) -> object:
            return find_packing([packed], rule)

        def whole(batch: dict[str, Any] = batch, rule: PackingRule = rule) -> object:
            return pack_batches([batch], rule)

        sides: dict[str, Callable[[], object]] = {"before": before, "step": step, "collator": whole}
        seconds[size] = seconds_in_turns(sides, repeats, calls=3)
    largest = seconds[SIZES[-1]]
    details = {"seconds": {str(size): medians(found) for size, found in seconds.items()}}
    texts = f"{SIZES[-1]} texts"
    return {
        "packing_step": Figure(
            f"seconds of a step for packing {texts}, packed by the collator / in the step",
            ratios(largest["step"], largest["before"]),
            at_most=0.02,
            details=details,
        ).record(),
        "packing_work": Figure(
            f"seconds of packing {texts}, bounded search / each number of rows tried",
            ratios(largest["collator"], largest["before"]),
            at_most=0.25,
            details=details,
        ).record(),
    }
