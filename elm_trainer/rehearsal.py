"""Rehearse a run on a few of the model's layers and rows, and predict its memory and time from what that takes."""

import copy
import io
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .data.target_store import reason_against
from .fitting import empty_model
from .head import chunk_of
from .methods.elm import ElmTrainer
from .methods.elm_config import ElmConfig, chosen_state_layers, stored_targets
from .methods.placement import contrast_directions
from .methods.targets import batch_rows
from .watch import Batches, Cut, Lap, Watch, now, peak_bytes, reset_peak


# Batches of the rehearsal, each seen twice: the first time costs more where its shape is new. With `erase_after` they are seen
# once more, without the erase term.
_BATCHES = 2
_LENGTHS = 256
# A forward for choosing directions sees more rows than this rarely; larger matrices are timed at this size and scaled.
_WIDEST = 512


@dataclass(frozen=True)
class Prediction:
    """What a run will take. Bytes are of the process on a CPU, else of the accelerator; seconds of this machine, as busy
    as it was.
    """

    measured: str  # what was rehearsed
    weights: int  # bytes of the frozen weights
    adapter: int  # bytes of the adapter, its gradient and the optimizer
    activations: int  # bytes kept for the backward pass of the largest batch
    logits: int  # bytes of a chunk of logits with their gradient
    rest: int  # bytes of Python, the libraries and buffers
    targets_disk: int  # bytes of the targets on disk; 0 where they are made in each step
    tokens: int  # mean tokens of a forward pass, gaps included
    rows: int  # rows of it
    steps: int  # updates
    step_seconds: float  # mean of an update
    targets_seconds: float  # of the targets of all rows
    contrast_seconds: float  # of the choice of the adapter's directions

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.adapter + self.activations + self.logits + self.rest

    @property
    def seconds(self) -> float:
        """Seconds of targets and training, without loading and evaluation."""
        return self.targets_seconds + self.contrast_seconds + self.steps * self.step_seconds


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights without those of its adapter, which are in float32."""
    return model_bytes(model) - 4 * sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)


def adapter_bytes(model: nn.Module, frozen_directions: bool) -> int:
    """Bytes of an adapter in float32, with its gradient and two moments of Adam for what is trained of it."""
    found = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(numbers * (4 if frozen_directions and "lora_A" in name else 16) for name, numbers in found)


def adapted(config: PreTrainedConfig, lora: LoraConfig, dtype: torch.dtype) -> nn.Module:
    """The whole model with its adapter on the meta device."""
    model = empty_model(config, dtype)
    with torch.device("meta"):
        return get_peft_model(model, copy.deepcopy(lora))


def rehearse(
    config: PreTrainedConfig,
    args: ElmConfig,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    lora: LoraConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    free_disk: int = 2**62,
    each: int = 2,
) -> Prediction:
    """Train a cut of the model, with random weights, on two batches twice, and scale what it takes to the whole run.

    The cut is trained by [`ElmTrainer`] with the run's settings: it has two layers of each kind, those below the first
    adapted one, those with an adapter, those above. Memory is the peak of the rehearsal, and for all that the run has
    beyond the cut its weights, its adapter and what its layers keep for the backward pass, which is counted. Time is
    that of the rehearsal, and for every further layer that of the last one of its kind. Batches of a shape that was not
    seen before take longer on a CPU; how many there will be is drawn from the lengths of the texts. With `erase_after`, steps without
    the erase term are rehearsed by themselves.

    Args:
        lora: Adapter of the whole model.
        free_disk: Free bytes where targets are kept.
        each: Layers of each kind in the cut; the last shows what one more costs.
    """
    text = config.get_text_config()
    watched = chosen_state_layers(args.state_layers, text.num_hidden_layers) if args.state_weight else []
    cut = Cut.of(text.num_hidden_layers, lora.layers_to_transform, each, watched)
    batch = args.per_device_train_batch_size
    rows = [place * len(dataset) // (_BATCHES * batch) for place in range(_BATCHES * batch)]
    sampled = [place * len(dataset) // _LENGTHS for place in range(_LENGTHS)] if len(dataset) > _LENGTHS else None
    draws = Batches(args, tokenizer, text, dataset.select(sampled) if sampled else dataset)
    seen = Batches(args, tokenizer, text, dataset.select(rows))

    processes = args.world_size
    update = batch * args.gradient_accumulation_steps * processes
    steps = args.max_steps if args.max_steps > 0 else max(round(args.num_train_epochs * len(dataset) / update), 1)
    layout = stored_targets(args, text.vocab_size, text.hidden_size, watched).layout
    disk = layout.total_bytes(draws.positions(len(dataset)), len(dataset)) if layout.fields else 0
    stored = args.precompute_targets
    if stored is None:
        stored = not reason_against(
            rows=len(dataset), visits=steps * update, needed=disk, missing=disk, free=free_disk
        )
    peft = copy.deepcopy(lora)
    if peft.layers_to_transform is not None:
        peft.layers_to_transform = cut.adapted_places
    with TemporaryDirectory() as folder, _quietly():
        reset_peak()
        model = AutoModelForCausalLM.from_config(
            cut.config(config), dtype=dtype, attn_implementation=attn_implementation
        )
        probe = _Probe(
            model,
            _rehearsal_args(args, folder, bool(stored), [cut.chosen.index(layer) for layer in watched]),
            train_dataset=dataset.select(rows),
            processing_class=tokenizer,
            peft_config=peft,
            frozen_directions=bool(args.contrast_rows),
        )
        targets_peak = peak_bytes()
        reset_peak()
        probe.train()
        steps_peak = peak_bytes()
        own = frozen_bytes(probe.model)
        own_adapter = probe.adapter_bytes
        contrast = _contrast_seconds(probe, cut, args, min(args.contrast_rows, len(dataset)), draws, bool(stored))
        leaders = len(cut.kinds["first"] + cut.kinds["adapted"])
        moments = 8 * leaders * text.hidden_size**2 if args.contrast_rows else 0

    whole = adapted(config, lora, dtype)
    adapter = adapter_bytes(whole, bool(args.contrast_rows))
    weights = frozen_bytes(whole)
    # What all layers keep for the backward pass, by tokens, and for the largest batch that is likely.
    larger = draws.largest / max(seen.largest, 1)
    watch = probe.watch
    kept = sum(count * (watch.kept[place] * larger + watch.copied[place]) for place, count in cut.stands_for.items())
    in_cut = sum(watch.kept[place] + watch.copied[place] for place in cut.stands_for)
    outside = watch.kept[None] + watch.copied[None]
    # Logits of a chunk in the model's type and in float32, their gradient, and the soft-max on the way to it.
    logits = min(chunk_of(probe.args.device), draws.largest * text.vocab_size) * (dtype.itemsize + 3 * 4)
    growth = weights - own + adapter - own_adapter
    peak = max(targets_peak + growth + moments, steps_peak + growth + kept - in_cut + (larger - 1) * outside)

    step = _step_seconds(probe, cut, args, draws, seen.sizes[1], steps, adapter / max(own_adapter, 1))
    return Prediction(
        measured="the model's own size, with random weights"
        if not any(cut.more.values())
        else f"{len(cut.chosen)} of {text.num_hidden_layers} layers, with random weights, scaled",
        weights=weights,
        adapter=adapter,
        activations=int(kept + larger * outside),
        logits=logits,
        rest=max(int(peak - weights - adapter - kept - larger * outside - logits), 0),
        targets_disk=disk if stored else 0,
        tokens=round(draws.mean),
        rows=batch,
        steps=steps,
        step_seconds=step,
        targets_seconds=probe.targets_seconds(cut, len(dataset)) / processes if stored else 0.0,
        contrast_seconds=contrast,
    )


def _step_seconds(
    probe: "_Probe", cut: Cut, args: ElmConfig, draws: Batches, size: int, steps: int, adapters: float
) -> float:
    """Mean seconds of an update of the whole model, whose adapter is so many times that of the cut.

    The second batch, of `size` tokens, tells what its new shape costs: it is the second and the fourth step, and the sixth, without the
    erase term, where there is one.
    """
    first, fresh, warm, again, *early = probe.watch.laps
    usual = again.scaled(cut)
    more = max(fresh.scaled(cut) - usual, 0)
    if early:
        usual += args.erase_after * (early[-1].scaled(cut) - usual)
    once = max(first.seconds - warm.seconds - (fresh.seconds - again.seconds), 0)
    passed = usual * draws.mean / size + draws.fresh(steps) * more
    return args.gradient_accumulation_steps * passed + again.optimizer * adapters + once / steps


def _rehearsal_args(args: ElmConfig, folder: str, stored: bool, state_layers: list[int]) -> ElmConfig:
    """The run's settings, but for its length, its files and what it tells others."""
    args = copy.copy(args)
    for name, value in {
        "output_dir": folder, "targets_dir": folder, "precompute_targets": stored, "contrast_rows": 0,
        "max_steps": (3 if args.erase_after else 2) * _BATCHES, "num_train_epochs": 3, "gradient_accumulation_steps": 1, "logging_steps": 1000,
        "logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False,
        "report_to": [], "push_to_hub": False, "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "shuffle_dataset": False, "resume_from_checkpoint": None, "expert_steps": min(args.expert_steps, 1),
        "novice_steps": min(args.novice_steps, 1), "state_layers": state_layers or None,
    }.items():  # fmt: skip
        setattr(args, name, value)
    return args


class _Probe(ElmTrainer):
    """[`ElmTrainer`] on a cut, watched."""

    def __init__(self, *args: Any, frozen_directions: bool, **kwargs: Any):
        self._frozen_directions = frozen_directions
        # Of each batch of targets its rows, and what it takes the first time and the second.
        self._target_laps: list[tuple[int, Lap, Lap]] = []
        super().__init__(*args, **kwargs)

    def set_up(self):
        self.watch = Watch(self.model)
        self.adapter_bytes = adapter_bytes(self.model, self._frozen_directions)
        super().set_up()
        self.add_callback(self.watch)
        for name, parameter in self.model.named_parameters():
            if self._frozen_directions and "lora_A" in name:
                parameter.requires_grad_(False)

    def target_plan(self):
        plan = super().target_plan()

        def timed(inputs):
            lap, began = self.watch.new_lap(), now()
            made = plan.compute(inputs)
            lap.seconds = now() - began
            return made, lap

        def compute(inputs):
            (_, fresh), (made, warm) = timed(inputs), timed(inputs)
            self._target_laps.append((len(made), fresh, warm))
            return made

        return replace(plan, compute=compute)

    def erases(self):
        # However few of the run's steps have the term: first, since the first step tells what is kept for the backward pass.
        return bool(self.args.erase_weight) and self.state.global_step < 2 * _BATCHES

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        counted = torch.autograd.graph.saved_tensors_hooks(self.watch.keep, lambda kept: kept)
        with nullcontext() if self.watch.laps else counted:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.watch.begin_backward()
        return loss

    def targets_seconds(self, cut: Cut, rows: int) -> float:
        """Seconds of the targets of so many rows, of the whole model. Each batch of them has a shape of its own."""
        seen = sum(count for count, _, _ in self._target_laps)
        usual = sum(warm.scaled(cut) for _, _, warm in self._target_laps)
        more = statistics.mean(max(fresh.scaled(cut) - warm.scaled(cut), 0) for _, fresh, warm in self._target_laps)
        return usual / seen * rows + more * rows / batch_rows(self.args)

    def reference_seconds(self) -> float:
        """Seconds of one layer for the reference of one batch."""
        laps = [*(warm for _, _, warm in self._target_laps), *self.watch.laps[-1:]]
        return statistics.median([t for lap in laps for t in (lap.reference or lap.forward).values()])


def _contrast_seconds(probe: _Probe, cut: Cut, args: ElmConfig, rows: int, draws: Batches, stored: bool) -> float:
    """Seconds of choosing the adapter's directions: forwards over rows, products of inputs, and the eigenvectors."""
    if not rows:
        return 0.0
    layers = sum(map(len, cut.kinds.values()))
    batch = args.per_device_train_batch_size
    forwards = rows / batch * layers * probe.reference_seconds()
    if not stored:
        forwards *= 2  # the weights of the erase term come from targets
    hidden = probe.model.config.get_text_config().hidden_size
    size = min(hidden, _WIDEST)
    inputs = torch.randn(2 * size, size, device=probe.args.device)
    began = now()
    moment = inputs.T @ inputs / len(inputs)
    product = (now() - began) / len(inputs) * (hidden / size) ** 2
    began = now()
    contrast_directions(moment, moment, 1, 0.1)
    vectors = (now() - began) * (hidden / size) ** 3
    adapted = len(cut.kinds["first"] + cut.kinds["adapted"])
    return forwards + adapted * (vectors + product * rows * draws.mean / batch)


@contextmanager
def _quietly() -> Iterator[None]:
    """Nothing of the rehearsal is told: the run itself will say the same."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
