"""Batches of an evaluation, divided over the processes of a launch."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from ..launch import from_first as from_first
from ..launch import place as place
from ..modeling import is_partitioned


Batch = TypeVar("Batch")
Result = TypeVar("Result")


def run_batches(
    run: Callable[[Batch], Result],
    batches: Sequence[Batch],
    *models: torch.nn.Module,
    over_ranks: bool = False,
    description: str | None = None,
) -> list[Result]:
    """Results of all batches, in their order.

    Over several processes each one runs every n-th batch, and all of them receive all results. The batches themselves
    do not depend on the number of processes, so neither do the results. Where weights lie in shards (FSDP, ZeRO-3) no
    process can run the model alone: then each of them runs every batch, in step with the others.

    Args:
        run (`Callable`): Makes the result of a batch, something that can be pickled and lies on no device.
        batches (`Sequence`): Batches, the same ones in all processes.
        *models (`nn.Module`): Models that `run` runs.
        over_ranks (`bool`, *optional*, defaults to `False`): Whether to divide the batches; then all processes must call
            this.
        description (`str`, *optional*): Label of a progress bar over the batches that the first process runs.

    Returns:
        `list`: one result for each batch.
    """
    ranks, rank = place() if over_ranks else (1, 0)
    divided = ranks > 1 and not any(in_shards(model) for model in models)
    mine = range(rank, len(batches), ranks) if divided else range(len(batches))
    bar = tqdm(mine, desc=description, leave=False, disable=description is None or rank > 0)
    found = [(index, run(batches[index])) for index in bar]
    if divided:
        # PyTorch's own: Accelerate's gather nothing where it was started on CPUs and not told so.
        parts: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(parts, found)
        found = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
    return [result for _, result in found]


def in_shards(model: torch.nn.Module) -> bool:
    """Whether a model's weights are divided over processes, by FSDP or DeepSpeed ZeRO-3."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or is_partitioned(model)
