"""Trainings of a model that are timed one after the other, beside what docs/scale.md predicts of them."""

import json
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from elm_trainer import ElmConfig, ElmTrainer, NpoConfig, NpoTrainer, RmuConfig, RmuTrainer
from elm_trainer.modeling import DEMO_MODEL

from .prediction import Device, Memory, StepShape, memory, step_flops, step_seconds
from .shapes import Adapter, ModelShape
from .workers import peak_bytes, release_freed, reset_peak, resident_bytes


@dataclass(frozen=True)
class Size:
    """How large the parts are."""

    samples: int  # of three texts
    batch: int  # samples in a forward pass, which is an update
    text: int  # tokens of every text
    adapter: Adapter  # of all methods but RMU
    blocks: int  # of updates that are timed, after one that warms up
    updates: int  # of a block
    rating: float  # seconds in which a rate of the device is measured
    narrow: Mapping[str, int] = field(default_factory=dict)  # what replaces the sizes that a model's config names
    demo: Mapping[str, str] = field(default_factory=dict)  # options of the demo beside its recipe

    @property
    def steps(self) -> int:
        """Updates of a training."""
        return (self.blocks + 1) * self.updates


# `full` has the texts, the batch and the adapter of the table of 7B and 70B in docs/scale.md.
SIZES = {
    "full": Size(
        16, 8, 256, Adapter(256, (4, 5, 6, 7)), 3, 2, 1.0,
        demo={"measures": "multiple-choice cloze"},
    ),
    "tiny": Size(
        4, 2, 24, Adapter(4, (1, 2)), 2, 1, 0.01,
        # Four-bit weights come in blocks of 64.
        narrow={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 2048,
        },
        demo={
            "retain": "everyday",
            "measures": "multiple-choice", "questions": "2", "dataset_size": "4", "state_layers": "2", "max_steps": "2",
            "per_device_train_batch_size": "2", "warmup_steps": "0", "lora_layers": "1-2", "lora_rank": "4",
        },
    ),
}  # fmt: skip


@dataclass
class Run:
    """A part as it is run."""

    part: str = field(metadata={"help": "Name of the part."})
    folder: str = field(metadata={"help": "Where rows.jsonl goes, and what is needed meanwhile."})
    device: str = field(default="cuda", metadata={"help": "cuda or cpu."})
    size: str = field(default="full", metadata={"help": "full or tiny."})
    tokenizer: str = field(default=DEMO_MODEL, metadata={"help": "Tokenizer, cut to the model's vocabulary."})

    @property
    def sizes(self) -> Size:
        return SIZES[self.size]

    def add(self, name: str, setting: str = "", **values: Any) -> None:
        """Write a row."""
        with open(Path(self.folder) / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "setting": setting} | values) + "\n")

    @contextmanager
    def attempt(self, name: str, setting: str = "") -> Iterator[None]:
        """What fails in here is written as a row with its error, and the rest goes on."""
        try:
            yield
        except Exception as error:
            self.add(name, setting, error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc()[-4000:])

    def wait(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class Laps(TrainerCallback):
    """Seconds of an update in blocks of some, after a first block that warms up, and what memory was held at most."""

    def __init__(self, run: Run):
        self._run, self._began, self._done = run, 0.0, 0
        self.seconds: list[float] = []
        self.peak = 0

    def on_step_end(self, args, state, control, **kwargs):
        self._done += 1
        if self._done % self._run.sizes.updates:
            return
        self._run.wait()
        if self._began:
            self.seconds.append((time.perf_counter() - self._began) / self._run.sizes.updates)
            self.peak = peak_bytes()
        else:
            reset_peak()
        self._began = time.perf_counter()


@dataclass
class Bench:
    """A model whose trainings are timed one after the other."""

    run: Run
    model: PreTrainedModel  # every training leaves it as it was
    processing_class: PreTrainedTokenizerBase
    rows: Dataset  # tokens of the samples
    device: Device
    weight_bytes: float = 2  # of a frozen weight

    @property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.model.config)

    def settings(self, batch: int, checkpointing: bool = False, **more: Any) -> dict[str, Any]:
        """Fields that the configs of all methods share."""
        return dict(
            output_dir=f"{self.run.folder}/run", per_device_train_batch_size=batch, learning_rate=1e-5,
            lr_scheduler_type="constant", max_steps=self.run.sizes.steps, bf16=True, use_cpu=self.run.device == "cpu",
            activation_checkpointing=checkpointing, max_length=self.run.sizes.text, logging_strategy="no",
            save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        ) | more  # fmt: skip

    def step(self, texts: int, checkpointing: bool = False) -> StepShape:
        """What an update on so many texts a sample is made of."""
        count = self.run.sizes.batch * texts
        tokens = count * self.run.sizes.text
        return StepShape(
            tokens, tokens - count, self.run.sizes.text, weight_bytes=self.weight_bytes, checkpointing=checkpointing
        )

    def measure(
        self,
        name: str,
        setting: str,
        trainer_class: Callable[..., Any],
        config: Callable[[], Any],
        seconds: float,
        need: Memory | None,
        dataset: Dataset | None = None,
        adapter: Adapter | None = None,
    ) -> bool:
        """Train with an adapter, and write a row of what it took beside the prediction; say whether it ran to its end.

        Args:
            name (`str`), setting (`str`): What the row is called.
            trainer_class (`Callable`): The trainer.
            config (`Callable`): Makes its config, which may refuse what the machine lacks.
            seconds (`float`): Predicted seconds of an update.
            need ([`Memory`], *optional*): Predicted bytes, where there is a formula.
            dataset (`Dataset`, *optional*): Rows; those of the bench by default.
            adapter ([`Adapter`], *optional*): Adapter; that of the size by default.
        """
        release_freed()  # the training before, or the frames of its error, which hold what lies on the device
        held, laps, began = resident_bytes(), Laps(self.run), time.perf_counter()
        with self.run.attempt(name, setting):
            try:
                trainer = trainer_class(
                    self.model, config(), train_dataset=self.rows if dataset is None else dataset,
                    processing_class=self.processing_class, peft_config=(adapter or self.run.sizes.adapter).lora(),
                    callbacks=[laps],
                )  # fmt: skip
                self.run.wait()
                prepared = time.perf_counter() - began
                trainer.train()
            finally:
                self.put_back()
            took, loss = median(laps.seconds), trainer.state.log_history[-1]["train_loss"]
            if not math.isfinite(loss):
                raise FloatingPointError(f"the mean loss of {self.run.sizes.steps} updates is {loss}")
            row: dict[str, Any] = {
                "seconds": took, "spread": [min(laps.seconds), max(laps.seconds)], "predicted_seconds": seconds,
                "seconds_ratio": seconds / took, "prepared_seconds": prepared, "held_bytes": held,
                "peak_bytes": laps.peak, "loss": loss,
            }  # fmt: skip
            if need is not None:
                row |= {"predicted_bytes": need.total, "bytes_ratio": need.total / laps.peak}
            self.run.add(name, setting, attention=self.model.config._attn_implementation, **row)
            return True
        return False

    def put_back(self) -> None:
        """Take the adapter off the model, wherever a training ended."""
        for module in list(self.model.modules()):
            # What PEFT put into a layer's place stands in its parent.
            for name, child in list(module.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(module, name, child.get_base_layer())
        vars(self.model).pop("peft_config", None)
        if self.model.is_activation_checkpointing:
            self.model.activation_checkpointing_disable()
        # With this hook left behind, gradients would go through the frozen layers below the adapter.
        if hasattr(self.model, "_require_grads_hook"):
            self.model.disable_input_require_grads()
        self.model.requires_grad_(False)

    def elm(self, setting: str, checkpointing: bool = False) -> bool:
        """ELM with stored targets."""
        adapter, step = self.run.sizes.adapter, self.step(3, checkpointing)
        targets = tempfile.mkdtemp(dir=self.run.folder)

        def config() -> ElmConfig:
            given = self.settings(self.run.sizes.batch, checkpointing)
            return ElmConfig(preset="released", precompute_targets=True, targets_dir=targets, **given)

        need = memory(self.shape, adapter, step)
        seconds = step_seconds(self.shape, adapter, step, self.device)
        return self.measure("ELM", setting, ElmTrainer, config, seconds, need)

    def sft(self, setting: str, checkpointing: bool = False, packed: int = 1, **options: Any) -> bool:
        """TRL's fine-tuning on the same texts; with `packed`, so many of them to a row."""
        names = ("forget_ids", "retain_ids", "synthetic_ids")
        texts = Dataset.from_dict({"input_ids": [row[name] for row in self.rows for name in names]})
        count = 3 * self.run.sizes.batch // packed

        def config() -> SFTConfig:
            given = {"max_length": packed * self.run.sizes.text, "packing": packed > 1} | options
            return SFTConfig(**self.settings(count, checkpointing, **given))

        seconds = step_seconds(self.shape, self.run.sizes.adapter, self.step(3, checkpointing), self.device)
        # Its logits are whole, which the formulas of memory do not have.
        return self.measure("SFT", setting, SFTTrainer, config, seconds, None, dataset=texts)

    def npo(self) -> bool:
        """NPO with the reference's numbers stored."""
        adapter, step = self.run.sizes.adapter, self.step(2)
        targets = tempfile.mkdtemp(dir=self.run.folder)

        def config() -> NpoConfig:
            given = self.settings(self.run.sizes.batch)
            return NpoConfig(precompute_ref_log_probs=True, targets_dir=targets, **given)

        seconds = step_seconds(self.shape, adapter, step, self.device)
        return self.measure("NPO", "", NpoTrainer, config, seconds, memory(self.shape, adapter, step))

    def rmu(self) -> bool:
        """RMU at the published layer, with an adapter on the down projections that it trains."""
        layer = min(7, self.shape.layers - 1)
        adapter = Adapter(16, tuple(range(max(layer - 2, 0), layer + 1)), targets=("down_proj",))
        # No layer above is run, and no head; the reference reads the retain texts.
        cut, step = replace(self.shape, layers=layer + 1), replace(self.step(2), positions=0)
        reference = step_flops(cut, Adapter(0, (cut.layers,)), replace(self.step(1), positions=0))
        seconds = step_seconds(cut, adapter, step, self.device) + reference / self.device.flops
        need = memory(cut, adapter, step)
        need = replace(need, weights=self.shape.parameters * self.weight_bytes)

        def config() -> RmuConfig:
            return RmuConfig(layer=layer, **self.settings(self.run.sizes.batch))

        return self.measure("RMU", f"layer {layer}", RmuTrainer, config, seconds, need, adapter=adapter)
