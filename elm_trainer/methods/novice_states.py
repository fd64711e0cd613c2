"""Hold hidden states to the novice's: on forget text, a layer is to give what it gives a counterfactual novice."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn

from ..data.collator import ElmDataCollator
from ..modeling import decoder_layers, is_partitioned
from .forward import supervised_places
from .targets import place_model


if TYPE_CHECKING:
    from .elm import ElmTrainer

# Share of the mean spread that is added in every dimension, so that those in which expert and novice hardly differ do not count
# for more than those in which they do.
_DAMPING = 0.3
_ROWS, _BATCH = 64, 16


def default_state_layers(depth: int) -> list[int]:
    """Four layers of the upper third, the last among them: for 30 layers 20, 24, 27 and 29."""
    return sorted({min(depth - 1, round(depth * share)) for share in (2 / 3, 0.8, 0.9)} | {depth - 1})


def state_loss(hidden: torch.Tensor, novice: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`Σ_l Σ_d s_ld·(h_ld − n_ld)²` of each position, the squared distance to the novice's states.

    The paper matches the novice's distribution of tokens; this matches what the layers pass on to it. With the scale of
    [`state_scale`], a model that answers as the expert has a loss of 1 on average, and one that is the novice has 0.

    Args:
        hidden (`torch.Tensor`): What the layers of the trained model give, `[positions, layers, hidden]`.
        novice (`torch.Tensor`): The same of the novice.
        scale (`torch.Tensor`): s, `[layers, hidden]`.

    Returns:
        `torch.Tensor`: `[positions]` in float32, or in float64 for such states.
    """
    kept = torch.promote_types(hidden.dtype, torch.float32)
    return ((hidden.to(kept) - novice.to(kept)).square() * scale.to(kept)).sum((-2, -1))


def state_scale(spread: torch.Tensor, damping: float = _DAMPING) -> torch.Tensor:
    """`s_ld = 1 / (v_ld + δ·mean_d v_ld)`, divided by `L·Σ_d v_ld·s_ld`, so that the spread itself has a loss of 1.

    A few dimensions of a residual stream are larger than all others by orders of magnitude; without a scale they alone would
    be matched.

    Args:
        spread (`torch.Tensor`): v, the mean of `(e − n)²` over positions, `[layers, hidden]`.
        damping (`float`, *optional*, defaults to `0.3`): δ, above 0.
    """
    mean = spread.mean(-1, keepdim=True).clamp(min=torch.finfo(spread.dtype).tiny)
    scale = 1 / (spread + damping * mean)
    share = (spread * scale).sum(-1, keepdim=True)
    # Where expert and novice do not differ at all, nothing is to be matched.
    return torch.where(share > 0, scale / (len(spread) * share).clamp(min=torch.finfo(spread.dtype).tiny), 0.0)


@contextmanager
def layer_outputs(trainer: "ElmTrainer", model: nn.Module, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """While this holds, a forward leaves what the layers give in the list, in their order, `[rows, width, hidden]` each.

    Args:
        trainer ([`ElmTrainer`]): Trainer.
        model (`nn.Module`): Model, as the Trainer wrapped it.
        layers (`Sequence[int]`): Numbers of decoder layers, rising, from 0.
    """
    outputs: list[torch.Tensor] = []
    if not layers:
        yield outputs
        return
    # Both are measured by forwards of their own, which must not be watched.
    trainer.final_logits(model)
    trainer.texts_interact(model)

    def keep(_, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    stack = decoder_layers(trainer.accelerator.unwrap_model(model))
    handles = [stack[layer].register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def states_at(outputs: Sequence[torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
    """What the layers gave in some slots of the packed rows, `[slots, layers, hidden]`."""
    return torch.stack([output.flatten(0, 1).index_select(0, slots) for output in outputs], dim=1)


def states_of(
    trainer: "ElmTrainer",
    model: nn.Module,
    batches: Mapping[str, Mapping[str, Any]],
    name: str,
    outputs: Sequence[torch.Tensor],
) -> torch.Tensor:
    """What the layers gave at the supervised positions of one of the sub-batches of a forward, `[positions, layers, hidden]`."""
    names = list(batches)
    before = sum(batches[other]["input_ids"].numel() for other in names[: names.index(name)])
    slots = trainer.pack(model, list(batches.values())).slots
    return states_at(outputs, slots[supervised_places(batches[name]) + before])


def state_losses(
    trainer: "ElmTrainer",
    model: nn.Module,
    batches: Mapping[str, Mapping[str, Any]],
    name: str,
    outputs: Sequence[torch.Tensor],
    aim: torch.Tensor,
) -> torch.Tensor:
    """The [`state_loss`] of each position of one of the sub-batches to states `[positions, layers·hidden]`, `[positions]`."""
    hidden = states_of(trainer, model, batches, name, outputs)
    return state_loss(hidden, aim.view(hidden.shape), trainer._state_scale)


def measure_scale(trainer: "ElmTrainer", layers: Sequence[int]) -> torch.Tensor:
    """The [`state_scale`] of a model and its training rows, `[layers, hidden]` in float32.

    It is measured on at most 64 rows, taken evenly from the dataset, at each position as the erase term weighs it. All processes
    of a launch measure it on the same rows.

    Args:
        trainer ([`ElmTrainer`]): Trainer, before its model is wrapped.
        layers (`Sequence[int]`): See [`layer_outputs`].

    Raises:
        ValueError: if ZeRO-3 has split the weights.
    """
    if is_partitioned(trainer.model):
        raise ValueError(
            f"`state_weight` is {trainer.args.state_weight}, but ZeRO-3 has already split the model's weights: set it to 0, "
            "or train with ZeRO-2, DDP or FSDP."
        )
    dataset, collator = trainer.train_dataset, trainer.data_collator
    if isinstance(collator, ElmDataCollator):
        collator = replace(collator, targets=None)  # novices are run here, since experts are too
    place_model(trainer)
    rows = min(_ROWS, len(dataset))
    chosen = [row * len(dataset) // rows for row in range(rows)]
    spread, total = torch.zeros((), device=trainer.args.device), torch.zeros((), device=trainer.args.device)
    for start in range(0, rows, _BATCH):
        examples = [dataset[row] for row in chosen[start : start + _BATCH]]
        batch = trainer.on_device(collator(examples))["forget"]
        with trainer.accelerator.autocast():
            target = trainer.target(trainer.model, "erase", batch)
        expert, novice = (
            target[f"{side}_states"].float().unflatten(1, (len(layers), -1)) for side in ("expert", "novice")
        )
        weights = target["weights"].float()
        apart = (expert - novice).square()
        spread = spread + (weights[:, None, None] * apart).sum(0)
        total = total + weights.sum()
    return state_scale(spread / total)


def chosen_state_layers(given: Sequence[int] | None, depth: int) -> list[int]:
    """The layers of the state term: those that are given, or else [`default_state_layers`].

    Raises:
        ValueError: unless they are some of a model's, each once and rising.
    """
    layers = list(given or default_state_layers(depth))
    if layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
        raise ValueError(
            f"`state_layers` is {layers}, but the model has the layers 0 to {depth - 1}: name some of them, each once "
            "and in rising order."
        )
    return layers


def novice_mean(outputs: Sequence[torch.Tensor], slots: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The mean of the novices' states over draws, `[positions, layers, hidden]` in float32.

    Args:
        outputs (`Sequence[torch.Tensor]`): See [`layer_outputs`].
        slots (`torch.Tensor`): Slot of each token of the sub-batches, one after the other.
        index (`torch.Tensor`): Tokens of the novices, `[draws, positions]` (see [`ElmDataCollator`]).
    """
    return torch.stack([states_at(outputs, slots[draw]).float() for draw in index]).mean(0)


def check_novices(datasets: Mapping[str, Dataset]) -> None:
    """Raise `ValueError` unless every row has counterfactual novices, and all rows of a dataset as many."""
    for name, dataset in datasets.items():
        if "aligned" in dataset.column_names:
            continue
        counts = {len(novices) for novices in dataset["novices"]} if "novices" in dataset.column_names else {0}
        if counts != {max(counts)} or counts == {0}:
            raise ValueError(
                f'`{name}` has rows with {sorted(counts)} `novices`, but `novice="counterfactual"` needs as many for every '
                "forget text: make them with `counterfactuals`, or use the contexts."
            )
