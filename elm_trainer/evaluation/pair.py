"""An erased model beside its reference, and batches that the processes of a launch share."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..distributed import processes_and_rank
from ..head import standing_in
from ..modeling import adapter_disabled, decoder_layers, evaluating, is_partitioned


# Bytes of states that are kept at most.
_LIMIT = 2**30
Batch = TypeVar("Batch")
Result = TypeVar("Result")
Side: TypeAlias = Literal["reference", "erased"]
SIDES: tuple[Side, ...] = ("reference", "erased")


class ModelPair:
    """The erased model and the reference it came from.

    Args:
        erased ([`~transformers.PreTrainedModel`] or `PeftModel`): Erased model: an adapter on its base, a merged
            model, or any full checkpoint.
        reference ([`~transformers.PreTrainedModel`], *optional*): Model before the erasure. Left out for a
            `PeftModel`, whose base is the reference.

    Raises:
        TypeError: if one is not a model, but for instance its name.
        ValueError: if there is no reference, or its vocabulary is another one.
    """

    def __init__(self, erased: PreTrainedModel | PeftModel, reference: PreTrainedModel | PeftModel | None = None):
        for name, model in (("erased", erased), ("reference", reference)):
            if not isinstance(model, nn.Module) and not (name == "reference" and model is None):
                raise TypeError(
                    f"`{name}` is of type {type(model).__name__}, not a model: load it with `load_model_and_tokenizer` or "
                    "`load_erased`."
                )
        if reference is None and not isinstance(erased, PeftModel):
            raise ValueError(
                f"`reference` is None and the erased model is a {type(erased).__name__} without an adapter to disable: "
                "pass the model it was erased from."
            )
        if reference is not None:
            sizes = [model.config.get_text_config().vocab_size for model in (reference, erased)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"`reference` has a vocabulary of {sizes[0]} tokens and the erased model one of {sizes[1]}: pass "
                    "the model it was erased from."
                )
        self.erased = erased
        self._reference = reference
        self.below = SharedLayers()

    @contextmanager
    def use(self, side: Side) -> Iterator[PreTrainedModel | PeftModel]:
        """The model of a side, in evaluation mode and as it was afterwards; sides must not be nested."""
        model = self._reference if side == "reference" and self._reference is not None else self.erased
        off = side == "reference" and self._reference is None
        with evaluating(model), adapter_disabled(model) if off else nullcontext():
            yield model

    @contextmanager
    def sharing_layers(self) -> Iterator[None]:
        """While this holds, the erased model begins at its first adapted layer where the reference has run the same forward before."""
        self.below = SharedLayers(self.adapter if self._reference is None else None)
        try:
            yield
        finally:
            self.below = SharedLayers()

    @property
    def models(self) -> list[PreTrainedModel | PeftModel]:
        """The erased model, and the reference where it is another one."""
        return [self.erased] if self._reference is None else [self.erased, self._reference]

    @property
    def adapter(self) -> PeftModel | None:
        """The erased model where it carries an adapter, else `None`."""
        return self.erased if isinstance(self.erased, PeftModel) else None


class SharedLayers:
    """Runs the layers below the first adapted one once for both sides of a pair: up to there they are one model.

    What a forward of the reference leaves there is kept on its device, up to 1 GiB, until the erased model runs the same forward.
    Whether that changes anything is measured the first time.

    Args:
        model (`PeftModel`, *optional*): Model with its adapter; without one nothing is shared.
    """

    def __init__(self, model: PeftModel | None = None):
        self._layers: list[nn.Module] = []
        self._kept: dict[Hashable, Any] = {}
        self._bytes = 0
        self._measured = False
        if model is None or in_shards(model):
            return
        config: Any = model.config.get_text_config()
        if getattr(config, "num_kv_shared_layers", 0):
            return
        layers = list(decoder_layers(model))
        places = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
        adapted = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        self._layers = layers[: min((places.get(id(module), 0) for module in adapted), default=0)]

    def run(self, side: Side, key: Hashable, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What a forward gives that keeps no cache, on a side of the pair; `key` tells its inputs from all others."""
        if not self._layers:
            return forward()
        last = self._layers[-1]
        if side == "reference":
            handle = last.register_forward_hook(lambda _, args, output: self._keep(key, output))
            try:
                return forward()
            finally:
                handle.remove()
        if key not in self._kept:
            return forward()
        kept = self._kept.pop(key)
        self._bytes -= _size(kept)
        with standing_in(dict.fromkeys(self._layers, lambda *args, **kwargs: kept)):
            found = forward()
        if not self._measured:
            self._measured = True
            whole = forward()
            if not torch.equal(found, whole):
                self._layers, self._kept = [], {}
                return whole
        return found

    def _keep(self, key: Hashable, output: Any) -> None:
        if key not in self._kept and self._bytes + _size(output) <= _LIMIT:
            self._kept[key] = output
            self._bytes += _size(output)


def _size(output: Any) -> int:
    """Bytes of the states that a layer gives, alone or with others."""
    return (output[0] if isinstance(output, tuple) else output).nbytes


def run_batches(
    run: Callable[[Batch], Result],
    batches: Sequence[Batch],
    *models: nn.Module,
    over_ranks: bool = False,
    description: str | None = None,
) -> list[Result]:
    """Results of all batches, in their order.

    Over several processes each one runs every n-th batch, and all of them receive all results. The batches themselves
    do not depend on the number of processes, so neither do the results. Where weights lie in shards (FSDP, ZeRO-3) no
    process can run the model alone: all of them run every batch in step.

    Args:
        run: Makes the result of a batch, something that can be pickled and lies on no device.
        batches: Batches, the same ones in all processes.
        *models (`nn.Module`): Models that `run` runs.
        over_ranks: Whether to divide the batches; then all processes must call this.
        description: Label of a progress bar over the batches that the first process runs.

    Returns:
        `list`: one result for each batch.
    """
    ranks, rank = processes_and_rank() if over_ranks else (1, 0)
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


def in_shards(model: nn.Module) -> bool:
    """Whether a model's weights are divided over processes, by FSDP or DeepSpeed ZeRO-3."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or is_partitioned(model)
