"""ELM on hidden states: its state term (layers are to give what they give a counterfactual novice), and the input directions
that its adapter answers to. Both are measured on some training rows before training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.utils import logging

from ..data.collator import ElmDataCollator
from ..head import STATES
from ..modeling import decoder_layers, is_partitioned
from .forward import supervised_places
from .targets import place_model


if TYPE_CHECKING:
    from .elm import ElmTrainer

logger = logging.get_logger(__name__)
# Share of the mean spread that is added in every dimension, so that those in which expert and novice hardly differ do not count
# for more than those in which they do.
_DAMPING = 0.3
# Root mean square of what a chosen direction gives on forget text: about that of PEFT's own directions on inputs of
# variance 1 (uniform within ±1/√in, which is 1/√3).
_RESPONSE = 3**-0.5
# Rows on which the scale of the state term is measured; rows that are run at once for it, and for the directions.
_SCALE_ROWS, _SCALE_BATCH, _DIRECTIONS_BATCH = 64, 16, 32


def default_state_layers(depth: int) -> list[int]:
    """Four layers of the upper third, the last among them: for 30 layers 20, 24, 27 and 29."""
    return sorted({min(depth - 1, round(depth * share)) for share in (2 / 3, 0.8, 0.9)} | {depth - 1})


def chosen_state_layers(given: Sequence[int] | None, depth: int) -> list[int]:
    """The layers of the state term: those that are given, or else [`default_state_layers`].

    Raises `ValueError` unless they are some of a model's, each once and rising.
    """
    layers = list(given or default_state_layers(depth))
    if layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
        raise ValueError(
            f"`state_layers` is {layers}, but the model has the layers 0 to {depth - 1}: name some of them, each once "
            "and in rising order."
        )
    return layers


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
    """While this holds, a forward leaves what the layers give in the list, `[rows, width, hidden]` each; their numbers rise."""
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
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(stack[layer].register_forward_hook(keep))
        yield outputs


def _states_at(outputs: Sequence[torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
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
    return _states_at(outputs, slots[supervised_places(batches[name]) + before])


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
    """The [`state_scale`] of a model that is not wrapped yet and its training rows, `[layers, hidden]` in float32.

    It is measured on at most 64 rows, at each position as the erase term weighs it.
    """
    _check_weights(trainer, "state_weight")
    collator = trainer.data_collator
    if isinstance(collator, ElmDataCollator):
        collator = replace(collator, targets=None)  # novices are run here, since experts are too
    spread, total = torch.zeros((), device=trainer.args.device), torch.zeros((), device=trainer.args.device)
    for batches in _some_rows(trainer, collator, _SCALE_ROWS, _SCALE_BATCH):
        batch = batches["forget"]
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


def novice_targets(
    trainer: "ElmTrainer",
    model: nn.Module,
    batches: Mapping[str, Mapping[str, Any]],
    index: torch.Tensor,
    outputs: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The expert's states at the positions of forget text, and those that the state term leads to, `e − η·(e − n)` with the mean
    of the novices' over draws, `[positions, layers·hidden]` each in float32.

    Args:
        index: Which tokens of the sub-batches are the novices', `[draws, positions]` (see [`ElmDataCollator`]).
    """
    slots = trainer.pack(model, list(batches.values())).slots
    novice = torch.stack([_states_at(outputs, slots[draw]).float() for draw in index]).mean(0)
    expert = states_of(trainer, model, batches, "erase", outputs).float()
    led = torch.lerp(expert, novice, trainer.args.state_eta)
    return {"expert_states": expert.flatten(1), "novice_states": led.flatten(1)}


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


def _check_weights(trainer: "ElmTrainer", option: str) -> None:
    """Raise `ValueError` if ZeRO-3 has split the weights, which an option needs whole."""
    if is_partitioned(trainer.model):
        raise ValueError(
            f"`{option}` is {getattr(trainer.args, option)}, but ZeRO-3 has already split the model's weights: set it to 0, "
            "or train with ZeRO-2, DDP or FSDP."
        )


def _some_rows(trainer: "ElmTrainer", collator: Callable[..., Any], rows: int, size: int) -> Iterator[dict[str, Any]]:
    """Batches of so many training rows, taken evenly from the dataset: the same in all processes of a launch."""
    place_model(trainer)
    dataset = trainer.train_dataset
    rows = min(rows, len(dataset))
    chosen = [row * len(dataset) // rows for row in range(rows)]
    for start in range(0, rows, size):
        yield trainer.on_device(collator([dataset[row] for row in chosen[start : start + size]]))


def contrast_directions(forget: torch.Tensor, retain: torch.Tensor, count: int, damping: float) -> torch.Tensor:
    """The directions `u` of largest `uᵀ·F·u / uᵀ·(R + δ·tr(R)/d·I)·u`, where F and R are second moments of the inputs.

    They are the leading generalized eigenvectors of the pair, as of Fisher's discriminant and common spatial patterns,
    each scaled so that its response on forget text has a root mean square of `1/√3`. A LoRA matrix A that holds them
    hardly sees retain text, whatever B learns (compare the null space of kept knowledge in AlphaEdit, arXiv 2410.02355).

    Args:
        forget: F, `[in, in]`, the mean of `x·xᵀ` over positions of forget text.
        retain: R, the same of retain text.

    Returns:
        `torch.Tensor`: `[count, in]` in float32, the strongest first.
    """
    forget, retain = forget.double(), retain.double()
    identity = torch.eye(retain.size(0), dtype=retain.dtype, device=retain.device)
    factor = torch.linalg.cholesky(retain + damping * retain.trace() / retain.size(0) * identity)
    whitened = torch.linalg.solve_triangular(factor, forget, upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.T.contiguous(), upper=False)
    _, vectors = torch.linalg.eigh((whitened + whitened.T).float())
    chosen = vectors[:, -count:].flip(1).double()
    directions = torch.linalg.solve_triangular(factor.T.contiguous(), chosen, upper=True).T
    response = ((directions @ forget) * directions).sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
    return (directions * _RESPONSE / response).float()


def contrast_adapter(trainer: "ElmTrainer") -> None:
    """Put [`contrast_directions`] into the A of every LoRA layer of the trained adapter, and freeze them there.

    B is zero before training, so the model stays what it is. Positions of forget text count as the erase term weighs
    them; those of retain text that are learned half alike, and half by how much they look like forget text. The model is not
    wrapped yet. Raises `ValueError` if the adapter has no LoRA layer with a matrix A.
    """
    _check_weights(trainer, "contrast_rows")
    model, rows = trainer.model, min(trainer.args.contrast_rows, len(trainer.train_dataset))
    name = model.active_adapter
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A and isinstance(module.lora_A[name], nn.Linear)
    }
    if not layers:
        raise ValueError(
            f"`contrast_rows` is {trainer.args.contrast_rows}, but the adapter {name!r} has no LoRA layer with a matrix A: use "
            "a `LoraConfig` on linear layers, or set it to 0."
        )
    trainer.final_logits(model)  # measured by a forward of its own, which must not be counted
    moments = _Moments()
    with ExitStack() as hooks:
        for path, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(moments.hook(path)))
        # Forget text first: what is weighed on retain text depends on it.
        for side in ("forget", "retain"):
            for batches in _some_rows(trainer, trainer.data_collator, rows, _DIRECTIONS_BATCH):
                batch = batches[side]
                with trainer.accelerator.autocast():
                    texts = batch["rows"]
                    places = trainer.pack(model, [batch]).slots[supervised_places(batch)]
                    if side == "forget":
                        weights = (batch.get("target") or trainer.target(model, "erase", batch))["weights"]
                    else:
                        weights = torch.ones(len(texts), device=texts.device)
                    counts = torch.bincount(texts, minlength=len(batch["lengths"]))[texts]
                    moments.begin(side, places, weights / counts)
                    trainer.reference_positions(model, {side: batch}, {side: STATES})
                    moments.end()
    with torch.no_grad():
        directions: dict[str, torch.Tensor] = {}
        for path, layer in layers.items():
            leader, weight = moments.leader[path], layer.lora_A[name].weight
            if leader not in directions or directions[leader].size(0) < weight.size(0):
                forget, retain = moments.mean(leader, "forget"), moments.mean(leader, "retain")
                directions[leader] = contrast_directions(forget, retain, weight.size(0), trainer.args.contrast_damping)
            weight.copy_(directions[leader][: weight.size(0)])
            weight.requires_grad_(False)
    logger.info(f"The input directions of {len(layers)} LoRA layers were chosen on {rows} rows and frozen.")


class _Moments:
    """Weighted second moments of the inputs of modules; those that read the same tensor share one."""

    def __init__(self):
        self.leader: dict[str, str] = {}
        self._sums: dict[tuple[str, str], torch.Tensor] = {}
        self._totals: dict[tuple[str, str], torch.Tensor] = {}
        self._side = ""

    def begin(self, side: str, places: torch.Tensor, weights: torch.Tensor) -> None:
        self._side, self._places, self._weights = side, places, weights
        self._seen: dict[int, tuple[str, torch.Tensor]] = {}

    def end(self) -> None:
        self._side = ""
        self._seen.clear()

    def hook(self, path: str) -> Callable[..., None]:
        def read(_, args: tuple[torch.Tensor, ...]) -> None:
            if not self._side:
                return
            # The tensor is held, so that no other gets its id.
            leader, _ = self._seen.setdefault(id(args[0]), (path, args[0]))
            self.leader.setdefault(path, leader)
            if leader == path:
                # Sums of products in half precision would not be positive definite.
                with torch.autocast(args[0].device.type, enabled=False):
                    self._add(path, args[0].detach().flatten(0, 1).index_select(0, self._places).float())

        return read

    def _add(self, path: str, inputs: torch.Tensor) -> None:
        weights = self._weights.float()
        if self._side == "retain":
            # Half of the weight goes to positions in proportion to how much they look like forget text: an answer to
            # another question must be told from the concept's, and most words of retain text are no answers.
            likeness = ((inputs @ self._sums[path, "forget"]) * inputs).sum(-1) / inputs.square().sum(-1).clamp(1e-9)
            likeness = likeness * weights
            weights = (weights + likeness * weights.sum() / likeness.sum().clamp(min=1e-9)) / 2
        scaled = inputs * weights.sqrt()[:, None]
        key = (path, self._side)
        self._sums[key] = self._sums.get(key, 0) + scaled.T @ scaled
        self._totals[key] = self._totals.get(key, 0) + weights.sum()

    def mean(self, leader: str, side: str) -> torch.Tensor:
        return self._sums[leader, side] / self._totals[leader, side]
