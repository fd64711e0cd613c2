"""What a rehearsal measures: seconds of layers and steps, bytes that are kept, and the batches that a run will see."""

import copy
import random
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainerCallback

from .data.packing import best_rows
from .data.tokens import tokenize
from .methods.elm_config import ElmConfig, batch_weights
from .methods.forward import ATTENTION
from .modeling import decoder_layers


# Batches that are drawn to see how many tokens and shapes a run will have.
_DRAWN = 100
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cut:
    """Some layers of a model that stand for all."""

    # All layers by kind: "frozen" below the first adapted one, "first", "adapted", and "above" it without adapter.
    kinds: dict[str, list[int]]
    chosen: list[int]  # those that are rehearsed

    @classmethod
    def of(cls, layers: int, adapted: Sequence[int] | None, each: int = 2, watched: Sequence[int] = ()) -> "Cut":
        """The cut of a model of so many layers, of which these are adapted (all by default); those that are watched are in it."""
        marked = sorted(set(range(layers)) if adapted is None else set(adapted) & set(range(layers)))
        kinds = {
            "frozen": [*range(marked[0])],
            "first": marked[:1],
            "adapted": marked[1:],
            "above": sorted({*range(marked[0], layers)} - {*marked}),
        }
        chosen = {*kinds["frozen"][-each:], *(i for k in [*kinds][1:] for i in kinds[k][:each]), *watched}
        return cls(kinds, sorted(chosen))

    def places(self, kind: str) -> list[int]:
        """Places of a kind's layers in the cut."""
        return [place for place, layer in enumerate(self.chosen) if layer in self.kinds[kind]]

    @property
    def more(self) -> dict[str, int]:
        """Layers of each kind that the model has beyond the cut."""
        return {kind: len(layers) - len(self.places(kind)) for kind, layers in self.kinds.items()}

    @property
    def stands_for(self) -> dict[int, int]:
        """How many layers of the model each place of the cut stands for: the last one of a kind for all that were left out."""
        counts = dict.fromkeys(range(len(self.chosen)), 1)
        for kind, more in self.more.items():
            if more:
                counts[self.places(kind)[-1]] += more
        return counts

    @property
    def adapted_places(self) -> list[int]:
        """Places of the adapted layers in the cut."""
        return [*self.places("first"), *self.places("adapted")]

    def config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config of the cut. What it lists for each layer is kept for those that are chosen."""
        config = copy.deepcopy(config)
        text = config.get_text_config()
        count = text.num_hidden_layers
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == count > 1:
                setattr(text, name, [value[layer] for layer in self.chosen])
        text.num_hidden_layers = len(self.chosen)
        return config


class Lap:
    """Seconds of a step, by layer and outside of them."""

    def __init__(self) -> None:
        self.seconds = self.optimizer = 0.0
        self.forward: dict[int, float] = defaultdict(float)
        self.backward: dict[int, float] = defaultdict(float)
        # Without gradients, as of the reference.
        self.reference: dict[int, float] = defaultdict(float)

    def scaled(self, cut: Cut) -> float:
        """Seconds of the same step of the whole model, without the optimizer."""
        beyond = (
            (count - 1) * (self.forward[place] + self.backward[place] + self.reference[place])
            for place, count in cut.stands_for.items()
            if count > 1
        )
        return self.seconds - self.optimizer + sum(beyond)


class Watch(TrainerCallback):
    """Times layers and steps of a training, and counts what the first step keeps for its backward pass."""

    def __init__(self, model: nn.Module):
        self.laps: list[Lap] = []
        self.kept: dict[int | None, float] = defaultdict(float)
        self.copied: dict[int | None, float] = defaultdict(float)
        self._place: int | None = None
        self._in_backward = False
        self._since = self._mark = self._began = 0.0
        self.lap = Lap()
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._shapes = {
            shape for p in model.parameters() if p.dim() == 2 for shape in (tuple(p.shape), tuple(p.shape)[::-1])
        }
        self._found: set[int] = set()
        self._vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        layers = decoder_layers(model)
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._entering(place, layer), with_kwargs=True)
            layer.register_forward_hook(self._leaving(place))

    def new_lap(self) -> Lap:
        """Begin a lap."""
        self.lap = Lap()
        return self.lap

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor that autograd keeps."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        # Logits are dropped chunk by chunk within the forward, and their memory is used again.
        if key not in self._weights and key not in self._found and tensor.shape[-1:] != (self._vocabulary,):
            self._found.add(key)
            # The weights of a layer in another type do not grow with the texts.
            counts = self.copied if tuple(tensor.shape) in self._shapes else self.kept
            counts[self._place] += storage.nbytes()
        return tensor.detach()

    def begin_backward(self) -> None:
        """Note that the backward pass begins."""
        self._in_backward, self._mark = True, now()

    def _entering(self, place: int, layer: nn.Module) -> Any:
        def hook(_, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._in_backward:  # with activation checkpointing, layers run again
                return
            self._since, self._place = now(), place
            states = args[0] if args else kwargs["hidden_states"]
            passed = states.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())
            if passed and getattr(layer, "gradient_checkpointing", False) and not self.laps:
                self.keep(states)  # the one tensor that is kept of such a layer, which no hook of autograd sees
            if torch.is_grad_enabled() and states.requires_grad:
                states.register_hook(lambda gradient: self._passed(place))

        return hook

    def _leaving(self, place: int) -> Any:
        def hook(*_: Any) -> None:
            if not self._in_backward:
                times = self.lap.forward if torch.is_grad_enabled() else self.lap.reference
                times[place] += now() - self._since
                self._place = None

        return hook

    def _passed(self, place: int) -> None:
        if self._in_backward:
            self.lap.backward[place] += now() - self._mark
            self._mark = now()

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = now()

    def on_step_begin(self, args, state, control, **kwargs):
        self.new_lap()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # What is left went through the lowest layer that is trained, whose input needs no gradient.
        lowest = max((place for place in self.lap.forward if place not in self.lap.backward), default=0)
        self.lap.backward[lowest] += now() - self._mark
        self._in_backward, self._mark = False, now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.lap.optimizer = now() - self._mark

    def on_step_end(self, args, state, control, **kwargs):
        # With what is between two steps, such as the next batch.
        self.lap.seconds, self._began = now() - self._began, now()
        self.laps.append(self.lap)


class Batches:
    """The batches of rows of these lengths: how many tokens they have, and how many shapes."""

    def __init__(self, args: ElmConfig, tokenizer: PreTrainedTokenizerBase, config: Any, dataset: Dataset):
        positions = getattr(config, "max_position_embeddings", None) or 2**30
        limit = min(args.max_length or positions, positions)
        weights = batch_weights(args)
        columns = ["forget"] * bool(weights["erase"]) + ["retain"] * bool(weights["retain"])
        self._sides = {c: [min(len(t.ids), limit) for t in tokenize(tokenizer, dataset[c][:])] for c in columns}
        self._lengths = [[*row] for row in zip(*self._sides.values(), strict=True)]
        if args.consistency_weight:
            pairs = [p + c if c else "" for p, c in zip(dataset["prompt"], dataset["completion"], strict=True)]
            for row, pair in zip(self._lengths, tokenize(tokenizer, pairs), strict=True):
                row += [min(len(pair.ids), limit)] * bool(pair.ids)
        self._multiple = args.pad_to_multiple_of or 1
        self._attention = ATTENTION * config.hidden_size
        batch, rng = min(args.per_device_train_batch_size, len(self._lengths)), random.Random(args.seed)
        self.sizes = [
            self._size(self._lengths[start : start + batch]) for start in range(0, len(self._lengths), batch)
        ]
        self._drawn = [self._shape(rng.sample(self._lengths, batch)) for _ in range(_DRAWN)]
        tokens = [rows * width for rows, width in self._drawn]
        self.mean, self.largest = statistics.mean(tokens), max(max(self.sizes), sorted(tokens)[-5])

    def positions(self, rows: int) -> dict[str, int]:
        """Supervised positions of so many rows by side."""
        found = {side: sum(n - 1 for n in lengths) * rows // len(lengths) for side, lengths in self._sides.items()}
        return dict.fromkeys(("forget", "retain"), 0) | found

    def fresh(self, steps: int) -> float:
        """Share of steps whose batch has a shape that none before it had, beside the first."""
        drawn = self._drawn[: min(steps, _DRAWN)]
        return (len(set(drawn)) - 1) / max(steps, 1)

    def _shape(self, rows: list[list[int]]) -> tuple[int, int]:
        lengths = [length for row in rows for length in row]
        packed = best_rows(lengths, self._attention)
        width = max(sum(lengths[text] for text in row) for row in packed)
        return len(packed), -(-width // self._multiple) * self._multiple

    def _size(self, rows: list[list[int]]) -> int:
        count, width = self._shape(rows)
        return count * width


def now() -> float:
    """Seconds of a clock, once the accelerator has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """Largest number of bytes held since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        [line] = [line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")  # the kernel's word for the peak of the resident set
