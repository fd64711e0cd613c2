"""ELM's layers: its state term, by which they are to give what they give a counterfactual novice, and those that a step need not
run: frozen ones, whose output for a text is kept, and those that no loss term reads.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ..data.collator import ElmDataCollator
from ..data.packing import Packing
from ..head import STATES, standing_in, without_gradients
from ..modeling import decoder_layers, evaluating
from .forward import check_unsplit, some_rows, supervised_places, visits


if TYPE_CHECKING:
    from .elm import ElmTrainer

logger = logging.get_logger(__name__)
# Share of the mean spread that is added in every dimension, so that those in which expert and novice hardly differ do not count
# for more than those in which they do.
_DAMPING = 0.3
# Rows on which the scale of the state term is measured, and those that are run at once for it.
_SCALE_ROWS, _SCALE_BATCH = 64, 16
# Where `keep_states` is left out, so many bytes of states are kept at most.
LIMIT = 2**30
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


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


class LayerStates:
    """What some layers give in a forward over sub-batches, which is watched while this holds.

    Args:
        trainer: Trainer, whose `packed` says where the sub-batches' tokens lie in the rows of the forward.
        model: Model, as the Trainer wrapped it.
        batches: Sub-batches of the forward by name, in order.
        layers: Numbers of the layers, rising; without any, nothing is watched.
    """

    def __init__(
        self, trainer: "ElmTrainer", model: nn.Module, batches: Mapping[str, Mapping[str, Any]], layers: Sequence[int]
    ):
        self._trainer, self._model, self._batches, self._layers = trainer, model, batches, layers
        self.outputs: list[torch.Tensor] = []  # [rows, width, hidden] each

    def __enter__(self) -> "LayerStates":
        if self._layers:
            # Both are measured by forwards of their own, which must not be watched.
            self._trainer.packed.final_logits(self._model)
            self._trainer.packed.texts_interact(self._model)
            stack = decoder_layers(self._trainer.accelerator.unwrap_model(self._model))
            with ExitStack() as hooks:
                for layer in self._layers:
                    hooks.enter_context(stack[layer].register_forward_hook(self._keep))
                self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_) -> None:
        if self._layers:
            self._hooks.close()

    def _keep(self, _, args: Any, output: Any) -> None:
        self.outputs.append(output[0] if isinstance(output, tuple) else output)

    @cached_property
    def _slots(self) -> torch.Tensor:
        return self._trainer.packed.pack(self._model, list(self._batches.values())).slots

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """What they gave at places of the sub-batches' flattened tokens, `[places, layers, hidden]`."""
        slots = self._slots[places]
        return torch.stack([output.flatten(0, 1).index_select(0, slots) for output in self.outputs], dim=1)

    def of(self, name: str) -> torch.Tensor:
        """What they gave at the supervised positions of a sub-batch, `[positions, layers, hidden]`."""
        names = list(self._batches)
        before = sum(self._batches[other]["input_ids"].numel() for other in names[: names.index(name)])
        return self.at(supervised_places(self._batches[name]) + before)


def measure_scale(trainer: "ElmTrainer", layers: Sequence[int]) -> torch.Tensor:
    """The [`state_scale`] of a model that is not wrapped yet and its training rows, `[layers, hidden]` in float32.

    It is measured on at most 64 rows, at each position as the erase term weighs it.
    """
    check_unsplit(trainer, "state_weight")
    collator = trainer.data_collator
    if isinstance(collator, ElmDataCollator):
        collator = replace(collator, targets=None)  # novices are run here, since experts are too
    spread, total = torch.zeros((), device=trainer.args.device), torch.zeros((), device=trainer.args.device)
    for batches in some_rows(trainer, collator, _SCALE_ROWS, _SCALE_BATCH):
        batch = batches["forget"]
        with trainer.accelerator.autocast():
            target = trainer.targets(trainer.model, {"erase": batch}, erases=False)["erase"]
        expert, novice = (
            target[f"{side}_states"].float().unflatten(1, (len(layers), -1)) for side in ("expert", "novice")
        )
        weights = target["weights"].float()
        apart = (expert - novice).square()
        spread = spread + (weights[:, None, None] * apart).sum(0)
        total = total + weights.sum()
    return state_scale(spread / total)


def novice_targets(states: LayerStates, index: torch.Tensor, eta: float) -> dict[str, torch.Tensor]:
    """The expert's states at the positions of forget text, and those that the state term leads to, `e − η·(e − n)` with the mean
    of the novices' over draws, `[positions, layers·hidden]` each in float32.

    Args:
        index: Which tokens of the sub-batches are the novices', `[draws, positions]` (see [`ElmDataCollator`]).
    """
    novice = torch.stack([states.at(draw).float() for draw in index]).mean(0)
    expert = states.of("erase").float()
    return {"expert_states": expert.flatten(1), "novice_states": torch.lerp(expert, novice, eta).flatten(1)}


class FrozenLayers:
    """Runs the layers below the first trained one once for each text, and leaves out those above the last one that is read.

    What enters the first trained layer depends on frozen weights and on the text alone. It is kept on the model's device from the
    first time that a text is seen, by the text's tokens, as long as there is room. In the step, the layers below stand aside,
    and the last of them gives what was kept. Whether that changes anything is measured on the first batch.

    Args:
        trainer: Trainer, before its model is wrapped.
        last: The last layer whose output a loss term reads; none where a term reads logits.
    """

    def __init__(self, trainer: "ElmTrainer", last: int | None):
        self._trainer, self._last = trainer, last
        self._left = trainer.processing_class.padding_side == "left"
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._layers = list(decoder_layers(model))
        self._first = self._first_trained(model)
        wanted = trainer.args.keep_states
        self._limit = 0 if wanted is False else None if wanted else LIMIT
        if wanted is None and (last is None or visits(trainer) <= len(trainer.train_dataset or ())):
            self._limit = 0  # a text that is seen once is not worth keeping
        self._kept: dict[bytes, torch.Tensor] = {}
        self._bytes = 0
        # Whether layers may stand aside, with kept states and without; and whether they give a tuple. Found out on the first batch.
        self._usable: dict[bool, bool] = {}
        self._tuples = False
        if reason := self._hindrance(model):
            self._usable = {True: False, False: False}
            if wanted:
                raise ValueError(f"`keep_states` is True, but {reason}: leave it out.")
        elif self._limit != 0 and self._first and isinstance(trainer.data_collator, ElmDataCollator):
            trainer.data_collator.keyed = True

    def _first_trained(self, model: nn.Module) -> int:
        """Number of the first trained layer; 0 where a weight outside of the layers is trained too."""
        number = {parameter: n for n, layer in enumerate(self._layers) for parameter in layer.parameters()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return min((number.get(parameter, 0) for parameter in trained), default=0)

    def _hindrance(self, model: nn.Module) -> str | None:
        """Why layers can't stand aside in this run, if so."""
        trainer = self._trainer
        if trainer.accelerator.distributed_type in _SHARDED:
            return (
                f"{trainer.accelerator.distributed_type.value} shards the layers, and gathers them one after the other"
            )
        if trainer.args.torch_compile:
            return "`torch_compile` has the layers compiled together"
        if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
            return "layers share the keys and values of layers below"
        below = [module for layer in self._layers[: self._first] for module in layer.modules()]
        # Dropout of attention is a number that the module passes on.
        odds = [module.p for module in below if isinstance(module, nn.Dropout)]
        odds += [value for module in below if isinstance(value := getattr(module, "attention_dropout", 0), float)]
        if any(odds):
            return "frozen layers have dropout, so that they give something else each time"
        return None

    @contextmanager
    def spared(
        self,
        model: nn.Module,
        batches: Mapping[str, Mapping[str, Any]],
        readings: Mapping[str, Any],
        leaving: Collection[str] | None = None,
    ) -> Iterator[None]:
        """While this holds, a forward over these sub-batches runs no more layers than it must.

        Args:
            model: Model, as the Trainer wrapped it.
            batches: Sub-batches of a step by term, in the order of its forward.
            readings: What is read of the logits of each.
            leaving: Where the forward is one of the reference, the sub-batches whose states it leaves for later steps.
        """
        above = self._last if all(reading is STATES for reading in readings.values()) else None
        # In another precision the reference's states would not be the step's.
        names = list(batches) if leaving is None else [] if self._trainer.args.target_dtype else list(leaving)
        if self._limit == 0 or not self._first or not all("keys" in batches[name] for name in names):
            names = []
        if above is None and not names:
            yield
            return
        self._trainer.packed.final_logits(model)  # measured by a forward of its own
        packing = self._trainer.packed.pack(model, list(batches.values()))
        keeps = bool(names) and leaving is None
        if above is not None or keeps:
            if keeps not in self._usable:
                self._usable[keeps] = self._measure(model, batches, keeps, above)
            if not self._usable[keeps]:
                yield
                return
        entering = self._entering(model, batches, packing) if keeps else None
        # What enters the first trained layer, where this forward is to leave it.
        wanted = [self._first - 1] if names and not keeps else []
        with self._aside(entering, above), LayerStates(self._trainer, model, batches, wanted) as watched:
            yield
        for states in watched.outputs:
            self._keep_all(batches, names, packing, states)

    def _entering(self, model: nn.Module, batches: Mapping[str, Mapping[str, Any]], packing: Packing) -> torch.Tensor:
        """What enters the first trained layer, `[rows, width, hidden]` as the texts are packed."""
        if any(key not in self._kept for batch in batches.values() for key in batch["keys"]):
            found = self._run_below(model, batches)
            self._keep_all(batches, batches, packing, found)
            return found
        padded, side = [], "left" if self._left else "right"
        for batch in batches.values():
            rows = pad_sequence([self._kept[key] for key in batch["keys"]], True, padding_side=side)
            gap = batch["input_ids"].size(1) - rows.size(1)
            padded.append(F.pad(rows, (0, 0, gap, 0) if self._left else (0, 0, 0, gap)).flatten(0, 1))
        return torch.cat(padded)[packing.tokens]

    def _keep_all(
        self, batches: Mapping[str, Mapping[str, Any]], names: Collection[str], packing: Packing, states: torch.Tensor
    ) -> None:
        """Keep the states `[rows, width, hidden]` of the texts of some sub-batches, by their tokens, as long as there is room."""
        flat, offset = states.flatten(0, 1), 0
        for name, batch in batches.items():
            seq = batch["input_ids"].size(1)
            for row, key in enumerate(batch["keys"] if name in names else ()):
                if key in self._kept:
                    continue
                length = batch["lengths"][row]
                start = offset + row * seq + (seq - length if self._left else 0)
                own = flat[packing.slots[start : start + length]]
                if self._limit is None or self._bytes + own.nbytes <= self._limit:
                    self._kept[key] = own
                    self._bytes += own.nbytes
            offset += batch["input_ids"].numel()

    @without_gradients()
    def _run_below(self, model: nn.Module, batches: Mapping[str, Mapping[str, Any]]) -> torch.Tensor:
        """What a forward through the frozen layers alone gives."""
        found: list[torch.Tensor] = []

        def entered(*args: Any, **kwargs: Any) -> Any:
            found.append(args[0] if args else kwargs["hidden_states"])
            return self._given(found[-1])

        with standing_in(
            {self._layers[self._first]: entered} | self._passing(range(self._first + 1, len(self._layers)))
        ):
            self._run(model, batches)
        return found[0]

    def _run(self, model: nn.Module, batches: Mapping[str, Mapping[str, Any]]) -> None:
        # Unwrapped: processes that have kept their texts run no forward, and the others must not wait for them.
        unwrapped = self._trainer.accelerator.unwrap_model(model)
        with self._trainer.accelerator.autocast():
            self._trainer.forward_positions(unwrapped, batches, dict.fromkeys(batches, STATES))

    def _given(self, states: torch.Tensor) -> Any:
        return (states,) if self._tuples else states

    def _passing(self, numbers: Sequence[int]) -> dict[nn.Module, Callable[..., Any]]:
        """Stand-ins that pass on what they get."""

        def passed(*args: Any, **kwargs: Any) -> Any:
            return self._given(args[0] if args else kwargs["hidden_states"])

        return {self._layers[number]: passed for number in numbers}

    @contextmanager
    def _aside(self, entering: torch.Tensor | None, last: int | None) -> Iterator[None]:
        """While this holds, layers below the first trained one and above the last stand aside."""
        instead = self._passing(range(last + 1, len(self._layers))) if last is not None else {}
        if entering is not None:
            instead |= self._passing(range(self._first - 1))
            # Not in front of the trained layer, which gradient checkpointing runs again when this no longer holds.
            instead[self._layers[self._first - 1]] = lambda *args, **kwargs: self._given(entering)
        with standing_in(instead):
            yield

    def _measure(
        self, model: nn.Module, batches: Mapping[str, Mapping[str, Any]], keeps: bool, last: int | None
    ) -> bool:
        """Whether the last layer that is read gives the same while others stand aside."""
        seen: list[Any] = []
        read = self._layers[-1 if last is None else last]
        seeing = read.register_forward_hook(lambda _, args, output: seen.append(output))
        with seeing, without_gradients(), evaluating(self._trainer.accelerator.unwrap_model(model)):
            self._run(model, batches)
            self._tuples = isinstance(seen[0], tuple)
            # What a layer gives beside its states would be missed.
            if not self._tuples or len(seen[0]) == 1:
                entering = self._run_below(model, batches) if keeps else None
                with self._aside(entering, last):
                    self._run(model, batches)
        # The forward that stops at the first trained layer passes on what enters it.
        first, again = (output[0] if self._tuples else output for output in (seen[0], seen[-1]))
        same = len(seen) > 1 and torch.allclose(first, again, rtol=1e-2, atol=1e-2 * first.abs().mean().item())
        if not same:
            logger.warning(
                f"{type(read).__name__} gives something else where layers stand aside, so each step runs all of them."
            )
        return same
