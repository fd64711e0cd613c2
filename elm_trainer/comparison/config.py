"""What a comparison is given (data, adapter, budgets, a grid of settings for each method), and what all of its runs share."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..attacks import load_attacks
from ..attacks.base import check_asked
from ..checks import check_numbers
from ..data.facts import FACTS
from ..data.questions import SPLITS, Question, read_questions, split_of
from ..data.sources import ConceptSources, build_erasure_dataset
from ..evaluation.measures import MEASURES, Setting
from ..evaluation.pair import ModelPair, Side
from ..evaluation.report import dataset_info, environment, suite_info
from ..evaluation.statistics import Items
from ..evaluation.suite import EvaluationSuite, bank_size, built_in_suite
from ..files import Runs
from ..fingerprint import model_fingerprint
from ..methods.base import ErasureTrainer
from ..methods.elm import ElmConfig, ElmTrainer
from ..methods.likelihood import GradDiffConfig, GradDiffTrainer, NpoConfig, NpoTrainer, SimNpoConfig, SimNpoTrainer
from ..methods.repnoise import RepNoiseConfig, RepNoiseTrainer
from ..methods.rmu import RmuConfig, RmuTrainer
from ..methods.whp import WhpConfig, WhpTrainer
from ..modeling import layer_range, load_model, load_tokenizer
from . import ComparisonSettings


class Method(NamedTuple):
    """A method: its trainer, the config of that, and the name that tables give it."""

    trainer: type[ErasureTrainer]
    config: type[SFTConfig]
    label: str


METHODS = {
    "elm": Method(ElmTrainer, ElmConfig, "ELM"),
    "rmu": Method(RmuTrainer, RmuConfig, "RMU"),
    "whp": Method(WhpTrainer, WhpConfig, "WHP"),
    "repnoise": Method(RepNoiseTrainer, RepNoiseConfig, "RepNoise"),
    "graddiff": Method(GradDiffTrainer, GradDiffConfig, "GradDiff"),
    "npo": Method(NpoTrainer, NpoConfig, "NPO"),
    "simnpo": Method(SimNpoTrainer, SimNpoConfig, "SimNPO"),
}
# What would make the budgets of two methods different ones.
_SHARED = (
    "gradient_accumulation_steps", "lr_scheduler_type", "max_length", "max_steps", "num_train_epochs", "output_dir",
    "per_device_train_batch_size", "seed",
)  # fmt: skip


@dataclass
class MethodSettings:
    r"""
    How a method is trained.

    Parameters:
        grid (`list[dict]`): The settings that the search tries, fields of the method's config. Every method has as
            many.
        fixed (`dict`, *optional*): Fields of the method's config that are the same in all of them.
        lora (`dict`, *optional*): `rank`, `layers` or `targets` of the adapter where a method needs others than the
            shared ones.
        updates (`int`, *optional*): Updates instead of the comparison's, for a method whose update costs a fraction of
            the others': the table then says so, and the table of equal time is the fair one.
    """

    grid: list[dict[str, Any]]
    fixed: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    updates: int | None = None


@dataclass
class ComparisonConfig(ComparisonSettings):
    """
    Settings of [`compare_methods`], checked.

    Raises:
        ValueError: for a concept without questions in both splits, an unknown method or field, grids of different sizes,
            settings that a method refuses or that would give it a budget of its own, a clock that is not compared, or a
            size below 1.
    """

    def __post_init__(self):
        sizes = ("dataset_size", "lora_rank", "updates", "questions", "dev_questions", "prompts")
        check_numbers(self, [("at least 1", sizes)])
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` is {self.seeds}: give at least one, and each once.")
        if self.search_seed in self.seeds:
            raise ValueError(f"`search_seed` is {self.search_seed}, one of `seeds`: search with another.")
        if self.bank:
            for split in SPLITS:
                self.own_questions(split)
            if not self.forget and self.concept not in FACTS:
                raise ValueError(f"`forget` is None: name a source of text about {self.concept!r}.")
        elif self.concept not in FACTS:
            raise ValueError(
                f"`concept` is {self.concept!r}, about which no questions are built in ({', '.join(FACTS)} have some): give "
                "a `bank`, and `forget`."
            )
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"`methods` names {unknown}, which do not exist; use: {', '.join(METHODS)}.")
        if self.clock not in self.methods:
            raise ValueError(
                f"`clock` is {self.clock!r}, which is not compared: use one of {', '.join(self.methods)}."
            )
        grids = {name: len(self.settings(name).grid) for name in self.methods}
        if len(set(grids.values())) > 1 or not all(grids.values()):
            raise ValueError(f"`methods` have grids of {grids} settings: give each the same number, at least one.")
        if self.ladder:
            load_attacks(self.ladder)
        for name in self.methods:
            if self.updates_of(name) < 1:
                raise ValueError(f"`methods.{name}.updates` is {self.updates_of(name)}: it must be at least 1.")
            layer_range(self.lora_shape(name)["layers"])
            for index in range(len(self.settings(name).grid)):
                self.arguments(name, index, seed=0, output_dir="unused")

    def own_questions(self, split: str) -> list[Question] | None:
        """The questions of `bank` in a split; `None` where those of the concept are built in."""
        if self.bank is None:
            return None
        bank = read_questions(self.bank)
        check_asked(bank)
        found = [question for question in bank if split_of(question) == split]
        if not found:
            raise ValueError(f"`bank` {self.bank!r} has no subject in its {split} split: ask about more subjects.")
        return found

    def settings(self, method: str) -> MethodSettings:
        """The settings of a method."""
        try:
            return MethodSettings(**self.methods[method])
        except TypeError as error:
            raise ValueError(
                f"`methods.{method}` is {self.methods[method]}: it has a grid, fixed, lora and updates."
            ) from error

    def updates_of(self, method: str) -> int:
        """Updates of a method's search, and of its row in the table of updates."""
        own = self.settings(method).updates
        return self.updates if own is None else own

    def chosen(self, method: str, index: int) -> dict[str, Any]:
        """The fields of a method's config that are its own in one of its settings."""
        settings = self.settings(method)
        return settings.fixed | settings.grid[index]

    def arguments(self, method: str, index: int, *, seed: int, output_dir: str, max_steps: int = 1) -> SFTConfig:
        """The config with which a method is trained."""
        own = self.chosen(method, index)
        if shared := [name for name in own if name in _SHARED]:
            raise ValueError(f"`methods.{method}` sets {shared}, which all methods share: set it in `training`.")
        fields: dict[str, Any] = {
            "bf16": False,
            "activation_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,  # every update's loss is looked at, so that one that is not finite ends the run
            **self.training,
            **own,
            # The same rate at every update, so that one run gives the models of both budgets.
            "lr_scheduler_type": "constant_with_warmup",
            "seed": seed,
            "output_dir": output_dir,
            "max_steps": max_steps,
        }
        try:
            return METHODS[method].config(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`methods.{method}`, setting {index}: {error}") from error

    def lora_shape(self, method: str) -> Mapping[str, Any]:
        """`rank`, `layers` and `targets` of a method's adapter."""
        shared = {"rank": self.lora_rank, "layers": self.lora_layers, "targets": self.lora_targets}
        own = self.settings(method).lora
        if unknown := own.keys() - shared.keys():
            raise ValueError(f"`methods.{method}.lora` has {sorted(unknown)}; it takes: {', '.join(shared)}.")
        return shared | own


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

    def measure(self, pair: ModelPair, suite: EvaluationSuite, side: Side) -> dict[str, Any]:
        """The items of all metrics of one side of a pair, as JSON holds them."""
        setting = Setting(pair, self.processing_class, suite, {}, temperature=0.0, batch_size=16, seed=0)
        items: dict[str, Items] = {}
        for name in ("multiple-choice", "open-answers", "cloze", "greedy-fluency", "specificity"):
            items |= MEASURES[name](setting, side)
        return {name: asdict(found) for name, found in items.items() if not name.endswith(".removed")}


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


def from_json(items: Mapping[str, Any]) -> dict[str, Items]:
    """Items that JSON held."""
    return {name: Items(**found) for name, found in items.items()}


@dataclass(frozen=True)
class Reference:
    """What all runs share, but for the model and the training texts, which each process makes for itself.

    Attributes:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        suites (`dict[str, EvaluationSuite]`): What is asked, by split.
        identity (`dict[str, dict]`): What metrics of a split depend on, beside how a model was trained: `versions` of packages,
            SHA-256 of the `model`, and size and SHA-256 of the `questions`.
        items (`dict[str, dict]`): The reference's items by split, as JSON holds them.
        data (`dict[str, dict]`): Size and SHA-256 of the training texts, by seed.
    """

    processing_class: PreTrainedTokenizerBase
    suites: dict[str, EvaluationSuite]
    identity: dict[str, dict[str, Any]]
    items: dict[str, dict[str, Any]]
    data: dict[str, dict[str, Any]]


def measure_reference(config: ComparisonConfig, runs: Runs) -> Reference:
    """Make what is shared; the reference is measured unless that is finished."""
    bench = Bench(config, load_tokenizer(config.model))
    data = {}
    for seed in (*config.seeds, config.search_seed):
        rows = bench.dataset(seed)
        data[str(seed)] = {name: dataset_info(rows[name]) for name in ("forget", "retain", "prompt", "completion")}
    suites = {split: suite_of(config, split) for split in SPLITS}
    shared = {"versions": environment({})["versions"], "model": model_fingerprint(bench.model)}
    pair = ModelPair(bench.model, bench.model)
    identity, items = {}, {}
    for split, suite in suites.items():
        lengths = {"tokens": suite.answer_tokens, "fluency tokens": suite.max_new_tokens}
        identity[split] = shared | {"questions": suite_info(suite) | {"answers": lengths}}
        measure = partial(bench.measure, pair, suite, "reference")
        items[split] = runs.once(f"reference-{split}", identity[split], measure)
    return Reference(bench.processing_class, suites, identity, items, data)
