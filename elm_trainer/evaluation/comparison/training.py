"""One training run that yields the models of both budgets: so many updates, and so many seconds."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import set_seed
from trl import SFTConfig

from ...methods.base import NonFiniteLossError
from .bench import Bench
from .config import METHODS


# The run ends when both budgets are used; the rate is constant, so nothing depends on this number.
_NO_END = 1_000_000


@dataclass(frozen=True)
class Snapshot:
    """An adapter on the way.

    Attributes:
        updates (`int`): Updates it has had.
        seconds (`float`): Seconds since the run began, set-up included.
        state (`dict[str, torch.Tensor]`): The adapter's tensors; empty after no update.
    """

    updates: int
    seconds: float
    state: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


@dataclass
class Training:
    """A finished run.

    Attributes:
        model (`PeftModel`): The model with its adapter.
        setup (`float`): Seconds before the first update: tokens, teachers, targets, labels, reference log-probabilities.
        snapshots (`dict[str, Snapshot]`): The adapters by budget, `"updates"` and, where one was set, `"seconds"`; one
            that a failure came before is missing.
        failed (`str`, *optional*): Why the run ended early: a loss or a weight became NaN or infinite.
    """

    model: PeftModel
    setup: float
    snapshots: dict[str, Snapshot]
    failed: str | None


class Budgets(TrainerCallback):
    """Keeps the adapter after so many updates and the last one within so many seconds, then ends the run.

    Args:
        updates (`int`): Budget in updates.
        seconds (`float`, *optional*): Budget in seconds since this was made.
    """

    def __init__(self, updates: int, seconds: float | None):
        self._updates, self._seconds, self._started = updates, seconds, time.perf_counter()
        self.setup = 0.0
        self.failed: str | None = None
        self.snapshots: dict[str, Snapshot] = {}
        self._within = Snapshot(0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.setup = time.perf_counter() - self._started
        self._within = Snapshot(0, self.setup)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = time.perf_counter() - self._started
        open_ended = self._seconds is not None and "seconds" not in self.snapshots
        if open_ended and now > self._seconds:
            self.snapshots["seconds"] = self._within
            open_ended = False
        if open_ended or state.global_step == self._updates:
            # Without the last argument PEFT would look on the Hub, at every update, whether the vocabulary has grown.
            state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in state_dict.items()}
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                self.failed = f"Weights became NaN or infinite by update {state.global_step}."
                control.should_training_stop = True
                return
            self._within = Snapshot(state.global_step, now, tensors)
            if state.global_step == self._updates:
                self.snapshots["updates"] = self._within
        if "updates" in self.snapshots and not open_ended:
            control.should_training_stop = True


@contextmanager
def trained(bench: Bench, method: str, index: int, seed: int, *, seconds: float | None = None) -> Iterator[Training]:
    """Train a method in one of its settings; the model is handed back without its adapter.

    Args:
        bench ([`Bench`]): Model and data.
        method (`str`): One of `METHODS`.
        index (`int`): Which setting of its grid.
        seed (`int`): Seed.
        seconds (`float`, *optional*): Budget in seconds, beside that in updates.
    """
    config = bench.config
    model, dataset = bench.model, bench.dataset(seed)
    set_seed(seed)  # of new adapters
    with tempfile.TemporaryDirectory() as folder:
        steps = config.updates if seconds is None else _NO_END
        args = config.arguments(method, index, seed=seed, output_dir=folder, max_steps=steps)
        budgets = Budgets(config.updates, seconds)
        trainer = METHODS[method].trainer(
            model,
            _with_own_targets(args, Path(folder) / "targets"),
            train_dataset=dataset,
            processing_class=bench.processing_class,
            peft_config=config.lora(method, model),
        )
        try:
            trainer.add_callback(budgets)
            trainer.remove_callback(PrinterCallback)  # without bars it would print every log
            try:
                trainer.train()
            except NonFiniteLossError as error:
                budgets.failed = str(error)
            yield Training(trainer.model, budgets.setup, budgets.snapshots, budgets.failed)
        finally:
            trainer.model.unload()


def _with_own_targets(args: SFTConfig, folder: Path) -> SFTConfig:
    """Where a method keeps its targets on disk, the run makes its own: their time is part of what is compared."""
    if "targets_dir" in {field.name for field in fields(args)}:
        args.targets_dir = str(folder)
    return args


def restore(model: PeftModel, snapshot: Snapshot) -> None:
    """Put the tensors of a snapshot into the model's adapter."""
    set_peft_model_state_dict(model, snapshot.state)
