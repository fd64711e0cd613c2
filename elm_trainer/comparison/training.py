"""What the runs of a comparison share (data, suite, reference), and one training run for both budgets: updates and seconds."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_utils import set_seed

from ..data.dataset import ConceptSources, build_erasure_dataset
from ..data.questions import SPLITS
from ..evaluation.measures import MEASURES, Setting
from ..evaluation.pair import ModelPair, Side
from ..evaluation.report import PACKAGES, dataset_info, suite_info
from ..evaluation.statistics import Items
from ..evaluation.suite import EvaluationSuite, bank_size, built_in_suite
from ..files import Runs
from ..fingerprint import model_fingerprint
from ..methods.forward import NonFiniteLossError
from ..modeling import load_model, load_tokenizer
from .config import METHODS, ComparisonConfig


MEASURED = ("multiple-choice", "open-answers", "cloze", "greedy-fluency", "specificity")
# Held-out texts of the retain set that belong to the dev split.
_DEV_TEXTS = 10


class Bench:
    """Model and data of a comparison, each made when it is first needed.

    Args:
        config ([`ComparisonConfig`]): Settings.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
    """

    def __init__(self, config: ComparisonConfig, processing_class: PreTrainedTokenizerBase):
        self.config, self.processing_class = config, processing_class

    @cached_property
    def model(self) -> PreTrainedModel:
        """The reference. A run that adapts it takes its adapter off again."""
        model = load_model(self.config.model, dtype=self.config.dtype)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def dataset(self, seed: int) -> Dataset:
        """What every method trains on with this seed."""
        config = self.config
        sources = ConceptSources(config.forget or config.concept, list(config.retain), config.synthetic or [])
        return build_erasure_dataset(
            {config.concept: sources}, size=config.dataset_size, processing_class=self.processing_class, seed=seed
        )

    def measure(self, pair: ModelPair, suite: EvaluationSuite, side: Side) -> dict[str, Items]:
        """All metrics of one side of a pair."""
        setting = Setting(pair, self.processing_class, suite, {}, temperature=0.0, batch_size=16, seed=0)
        items: dict[str, Items] = {}
        for name in MEASURED:
            items |= MEASURES[name](setting, side)
        return {name: found for name, found in items.items() if not name.endswith(".removed")}


def suite_of(config: ComparisonConfig, split: str) -> EvaluationSuite:
    """What is asked in the `"dev"` or the `"test"` split: no question, prompt or text is in both."""
    count = config.questions if split == "test" else config.dev_questions
    prompts = max(1, round(config.prompts * count / config.questions))
    # A third as many prompts as questions are drawn; what is beyond the size of the comparison is cut off.
    own = config.own_questions(split)
    banks = None if own is None else {config.concept: own}
    suite = built_in_suite([config.concept], max(count, 3 * prompts), split=split, banks=banks)
    half = max(1, count // 2)
    suite.concept_prompts = suite.concept_prompts[:prompts]
    suite.banks = {
        name: bank[: max(1, bank_size(count, suite.roles[name], bank[0].family))] for name, bank in suite.banks.items()
    }
    # Free answers take long, and those about anything but the concept have no bound.
    erased = suite.named("erased")
    suite.open_questions = {name: asked[:half] for name, asked in suite.open_questions.items() if name in erased}
    suite.cloze = {name: asked[:half] for name, asked in suite.cloze.items() if name in erased}
    suite.retain_texts = suite.retain_texts[:_DEV_TEXTS] if split == "dev" else suite.retain_texts[_DEV_TEXTS:]
    suite.forget_texts = []
    return suite


def to_json(items: Mapping[str, Items]) -> dict[str, Any]:
    """Items as JSON holds them."""
    return {name: asdict(found) for name, found in items.items()}


def from_json(items: Mapping[str, Any]) -> dict[str, Items]:
    """Items that JSON held."""
    return {name: Items(**found) for name, found in items.items()}


@dataclass(frozen=True)
class Reference:
    """The tokenizer, what is asked, and what the reference answers.

    Attributes:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        suites (`dict[str, EvaluationSuite]`): What is asked, by split.
        items (`dict[str, dict]`): The reference's items by split, as JSON holds them.
        versions (`dict[str, str]`): Versions of packages.
        model (`str`): SHA-256 of the weights.
        data (`dict[str, dict]`): Size and SHA-256 of the training texts, by seed.
        questions (`dict[str, dict]`): The same of what is asked, by split.
    """

    processing_class: PreTrainedTokenizerBase
    suites: dict[str, EvaluationSuite]
    items: dict[str, dict[str, Any]]
    versions: dict[str, str]
    model: str
    data: dict[str, dict[str, Any]]
    questions: dict[str, dict[str, Any]]

    def identity(self, split: str) -> dict[str, Any]:
        """What metrics of a split depend on, beside how a model was trained."""
        return {"versions": self.versions, "model": self.model, "questions": self.questions[split]}


def measure_reference(config: ComparisonConfig, runs: Runs) -> Reference:
    """Make what is shared; the reference is measured unless that is finished."""
    bench = Bench(config, load_tokenizer(config.model))
    suites = {split: suite_of(config, split) for split in SPLITS}
    texts = {seed: bench.dataset(seed) for seed in (*config.seeds, config.search_seed)}
    found = Reference(
        bench.processing_class,
        suites,
        {},
        {package: version(package) for package in PACKAGES},
        model_fingerprint(bench.model),
        {
            str(seed): {name: dataset_info(rows[name]) for name in ("forget", "retain", "prompt", "completion")}
            for seed, rows in texts.items()
        },
        {
            split: suite_info(suite)
            | {"answers": {"tokens": suite.answer_tokens, "fluency tokens": suite.max_new_tokens}}
            for split, suite in suites.items()
        },
    )

    def measure(split: str) -> dict[str, Any]:
        return to_json(bench.measure(ModelPair(bench.model, bench.model), suites[split], "reference"))

    for split in SPLITS:
        found.items[split] = runs.once(f"reference-{split}", found.identity(split), partial(measure, split))
    return found


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
        method: One of `METHODS`.
        index: Which setting of its grid.
        seconds: Budget in seconds, beside that in updates.
    """
    config = bench.config
    model, dataset = bench.model, bench.dataset(seed)
    set_seed(seed)  # of new adapters
    with tempfile.TemporaryDirectory() as folder:
        updates = config.updates_of(method)
        steps = updates if seconds is None else _NO_END
        args = config.arguments(method, index, seed=seed, output_dir=folder, max_steps=steps)
        budgets = Budgets(updates, seconds)
        if hasattr(args, "targets_dir"):
            # The run makes its own targets: their time is part of what is compared.
            args.targets_dir = str(Path(folder) / "targets")
        trainer = METHODS[method].trainer(
            model,
            args,
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


def restore(model: PeftModel, snapshot: Snapshot) -> None:
    """Put the tensors of a snapshot into the model's adapter."""
    set_peft_model_state_dict(model, snapshot.state)
