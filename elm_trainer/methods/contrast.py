"""Choose what an adapter can answer to: input directions that are strong on forget text and weak on retain text."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.utils import logging

from ..modeling import is_partitioned
from ..ops import STATES
from .base import ErasureTrainer
from .forward import supervised_places
from .targets import place_model


logger = logging.get_logger(__name__)
# Root mean square of what a chosen direction gives on forget text: about that of PEFT's own directions on inputs of
# variance 1 (uniform within ±1/√in, which is 1/√3).
_RESPONSE = 3**-0.5
_BATCH = 32


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


def contrast_adapter(
    trainer: ErasureTrainer, rows: int, damping: float, erase_weights: Callable[[Mapping[str, Any]], torch.Tensor]
) -> None:
    """Put [`contrast_directions`] into the A of every LoRA layer of the trained adapter, and freeze them there.

    B is zero before training, so the model stays what it is. Positions of forget text count as the erase term weighs
    them; those of retain text that are learned half alike, and half by how much they look like forget text. All
    processes of a launch choose on the same rows, and so the same directions.

    Args:
        trainer: Trainer, before its model is wrapped.
        rows: Training rows to choose on, taken evenly from the dataset.
        damping: See [`contrast_directions`].
        erase_weights: Gives the weight of each position of a forget batch in the erase term, `[positions]`.

    Raises:
        ValueError: if the adapter has no LoRA layer with a matrix A, or ZeRO-3 has split the weights.
    """
    if is_partitioned(trainer.model):
        raise ValueError(
            f"`contrast_rows` is {rows}, but ZeRO-3 has already split the model's weights: set it to 0, or train with "
            "ZeRO-2, DDP or FSDP."
        )
    name = trainer.model.active_adapter
    layers = {
        path: module
        for path, module in trainer.model.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A and isinstance(module.lora_A[name], nn.Linear)
    }
    if not layers:
        raise ValueError(
            f"`contrast_rows` is {rows}, but the adapter {name!r} has no LoRA layer with a matrix A: use a `LoraConfig` on "
            "linear layers, or set it to 0."
        )
    trainer.final_logits(trainer.model)  # measured by a forward of its own, which must not be counted
    moments = _Moments()
    handles = [layer.register_forward_pre_hook(moments.hook(path)) for path, layer in layers.items()]
    model, dataset = trainer.model, trainer.train_dataset
    place_model(trainer)
    rows = min(rows, len(dataset))
    chosen = [row * len(dataset) // rows for row in range(rows)]
    try:
        # Forget text first: what is weighed on retain text depends on it.
        for side in ("forget", "retain"):
            for start in range(0, rows, _BATCH):
                examples = [dataset[row] for row in chosen[start : start + _BATCH]]
                batch = trainer.on_device(trainer.data_collator(examples))[side]
                with trainer.accelerator.autocast():
                    texts = batch["rows"]
                    places = trainer.pack(model, [batch]).slots[supervised_places(batch)]
                    weights = erase_weights(batch) if side == "forget" else torch.ones(len(texts), device=texts.device)
                    counts = torch.bincount(texts, minlength=len(batch["lengths"]))[texts]
                    moments.begin(side, places, weights / counts)
                    trainer.reference_positions(model, {side: batch}, {side: STATES})
                    moments.end()
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        directions: dict[str, torch.Tensor] = {}
        for path, layer in layers.items():
            leader, weight = moments.leader[path], layer.lora_A[name].weight
            if leader not in directions or directions[leader].size(0) < weight.size(0):
                directions[leader] = contrast_directions(*moments.of(leader), weight.size(0), damping)
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

    def of(self, leader: str) -> tuple[torch.Tensor, torch.Tensor]:
        forget, retain = (leader, "forget"), (leader, "retain")
        return self._sums[forget] / self._totals[forget], self._sums[retain] / self._totals[retain]
