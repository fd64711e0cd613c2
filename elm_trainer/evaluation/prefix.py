"""Prompts that begin alike, such as those in one chat template: their beginning is read once for all of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import GenerationConfig, PreTrainedModel

from ..data.tokens import common_prefix
from .likelihood import suits_packing


# A forward pass of its own for fewer tokens costs more than it saves.
_LEAST_SHARED = 4


def generation_inputs(
    model: PreTrainedModel | PeftModel, rows: Sequence[list[int]], pad_token_id: int, new_tokens: int
) -> dict[str, Any]:
    """What `generate` is to be called with for a batch of prompts.

    The tokens that all of them begin with are run once, and their keys and values repeated for every row. Padding then
    stands behind them, `[shared, padding, rest]`, masked and without a position; otherwise on the left.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): Model, in evaluation mode.
        rows (`Sequence[list[int]]`): Tokens of each prompt.
        pad_token_id (`int`): Token that stands where there is none.
        new_tokens (`int`): Tokens that will be generated at most.

    Returns:
        `dict`: `input_ids` and `attention_mask`, `[rows, width]`, and where something is shared `past_key_values`.
    """
    width = max(len(row) for row in rows)
    shared = _shared(rows)
    if shared < _LEAST_SHARED or not suits_packing(model, width + new_tokens):
        shared = 0
    input_ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        rest = width - len(row) + shared
        input_ids[index, :shared], input_ids[index, rest:] = torch.tensor(row[:shared]), torch.tensor(row[shared:])
        mask[index, :shared] = mask[index, rest:] = 1
    inputs: dict[str, Any] = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}
    if shared:
        cache = model(input_ids=inputs["input_ids"][:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
        inputs["past_key_values"] = cache
    return inputs


@contextmanager
def generating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """While this holds, `generate` does what it is told and no more: whatever it is not told, it would take from the model's
    own settings, which may hold penalties, beams, a minimum length or a cache.

    It works under FSDP too, whose weights outside the layers only `forward` would gather, and
    what the head reads lies in one block: torch would multiply a slice of the states row by row with a head that needs no
    gradient, and copy its weights for every row.
    """
    head = model.get_output_embeddings()
    # PEFT keeps the settings beside the base's, and hands them over.
    parts = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    owned = [(part, part.generation_config) for part in parts if "generation_config" in vars(part)]
    for part, _ in owned:
        part.generation_config = GenerationConfig()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    sharded = isinstance(model, FSDPModule)
    if sharded:
        register_fsdp_forward_method(model, "generate")
    try:
        yield
    finally:
        for part, settings in owned:
            part.generation_config = settings
        handle.remove()
        if sharded:
            del model.generate  # the instance's; the method of the class is left


def _shared(rows: Sequence[list[int]]) -> int:
    """Tokens that all rows begin with, each with one left over; none for a single row."""
    if len(rows) == 1:
        return 0
    # What the first and the last in order have in common, all between them have.
    return min(common_prefix(min(rows), max(rows)), min(len(row) for row in rows) - 1)
