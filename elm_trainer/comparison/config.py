"""What a comparison is given: data, adapter, budgets, and a grid of settings for each method."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft import LoraConfig
from transformers import PreTrainedModel
from trl import SFTConfig

from ..attacks import load_attacks
from ..attacks.base import check_asked
from ..data.facts import FACTS
from ..data.questions import SPLITS, Question, read_questions, split_of
from ..methods.base import ErasureTrainer
from ..methods.elm import ElmConfig, ElmTrainer
from ..methods.likelihood import GradDiffConfig, GradDiffTrainer, NpoConfig, NpoTrainer, SimNpoConfig, SimNpoTrainer
from ..methods.repnoise import RepNoiseConfig, RepNoiseTrainer
from ..methods.rmu import RmuConfig, RmuTrainer
from ..methods.whp import WhpConfig, WhpTrainer
from ..modeling import layer_range, lora_config


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
class ComparisonConfig:
    r"""
    Settings of [`compare_methods`].

    Parameters:
        output_dir (`str`, *optional*, defaults to `"outputs/compare"`): Where the report goes, and in `runs/` what is
            finished.
        model (`str`, *optional*, defaults to `"smollm2-135m-instruct"`): Hub id, folder, GGUF file, or the bundled
            demo model.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of the weights.
        concept (`str`, *optional*, defaults to `"capitals"`): What is erased: a concept with built-in facts, or one of
            your own with `forget` and `bank`.
        forget (`str`, *optional*): Source of the forget text; by default the built-in text of the concept.
        bank (`str`, *optional*): Question bank of your own concept (see [`read_questions`]). A quarter of its
            subjects, told by their names, are the dev split.
        retain (`list[str]`, *optional*): Retain sources.
        synthetic (`str`, *optional*): Source of synthetic pairs, for the methods that use them.
        dataset_size (`int`, *optional*, defaults to `96`): Rows of the dataset; all methods train on the same ones.
        lora_rank (`int`, *optional*, defaults to `32`): Rank, and alpha, of the adapters.
        lora_layers (`str`, *optional*): First and last adapted layer, such as `"6-21"`; all by default.
        lora_targets (`str`, *optional*, defaults to `"all-linear"`): Adapted modules, comma-separated, or
            `"all-linear"`.
        training (`dict`, *optional*): Training arguments that all methods share; a method's own settings come before
            them.
        updates (`int`, *optional*, defaults to `12`): Updates of the search, and of the table of a set number of updates;
            a method can have its own.
        clock (`str`, *optional*, defaults to `"elm"`): Method whose time for these updates, set-up included, is the
            budget of the table of equal time.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`): Seeds of the final runs: of data, weights and order.
        search_seed (`int`, *optional*, defaults to `3`): Seed of the search.
        questions (`int`, *optional*, defaults to `40`): Questions of the test split per bank; half as many about facts
            of the concept that training did not see, and half as many open questions and lines to complete about the
            concept.
        dev_questions (`int`, *optional*, defaults to `24`): The same of the dev split, on which settings are chosen.
        prompts (`int`, *optional*, defaults to `20`): Prompts whose answers are judged for fluency; as a share of
            `questions` in the dev split too.
        attack_questions (`int`, *optional*, defaults to `24`): Questions asked under every attack.
        ladder (`str`, *optional*): YAML list of attacks on the first seed's run of each method; none without it.
        methods (`dict`): Fields of [`MethodSettings`] by method, one of `METHODS`.

    Raises:
        ValueError: for a concept without questions in both splits, an unknown method or field, grids of different sizes, settings that a method refuses or that
            would give it a budget of its own, a clock that is not compared, or a size below 1.
    """

    output_dir: str = field(default="outputs/compare", metadata={"help": "Where the report goes."})
    model: str = field(default="smollm2-135m-instruct", metadata={"help": "Hub id, folder, GGUF file or demo model."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})
    concept: str = field(default="capitals", metadata={"help": "What is erased."})
    forget: str | None = field(default=None, metadata={"help": "Source of the forget text."})
    bank: str | None = field(default=None, metadata={"help": "Question bank of your own concept."})
    retain: list[str] = field(default_factory=lambda: ["everyday"], metadata={"help": "Retain sources."})
    synthetic: str | None = field(default=None, metadata={"help": "Source of synthetic pairs."})
    dataset_size: int = field(default=96, metadata={"help": "Rows of the dataset."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters."})
    lora_layers: str | None = field(default=None, metadata={"help": "First and last adapted layer, such as 6-21."})
    lora_targets: str = field(default="all-linear", metadata={"help": "Adapted modules, comma-separated."})
    training: dict[str, Any] = field(default_factory=dict, metadata={"help": "Training arguments of all methods."})
    updates: int = field(default=12, metadata={"help": "Updates of the search and of one table."})
    clock: str = field(default="elm", metadata={"help": "Method whose time is the budget of the other table."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the final runs."})
    search_seed: int = field(default=3, metadata={"help": "Seed of the search."})
    questions: int = field(default=40, metadata={"help": "Questions per bank of the test split."})
    dev_questions: int = field(default=24, metadata={"help": "Questions per bank of the dev split."})
    prompts: int = field(default=20, metadata={"help": "Prompts judged for fluency."})
    attack_questions: int = field(default=24, metadata={"help": "Questions under every attack."})
    ladder: str | None = field(default=None, metadata={"help": "YAML list of attacks."})
    methods: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of each method."})

    def __post_init__(self):
        for name in ("dataset_size", "lora_rank", "updates", "questions", "dev_questions", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be at least 1.")
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
        sizes = {name: len(self.settings(name).grid) for name in self.methods}
        if len(set(sizes.values())) > 1 or not all(sizes.values()):
            raise ValueError(f"`methods` have grids of {sizes} settings: give each the same number, at least one.")
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

    def lora(self, method: str, model: PreTrainedModel) -> LoraConfig:
        """The adapter of a model that a method trains."""
        shape = self.lora_shape(method)
        return lora_config(model, rank=shape["rank"], targets=shape["targets"], layers=shape["layers"])

    def lora_shape(self, method: str) -> Mapping[str, Any]:
        """`rank`, `layers` and `targets` of a method's adapter."""
        shared = {"rank": self.lora_rank, "layers": self.lora_layers, "targets": self.lora_targets}
        own = self.settings(method).lora
        if unknown := own.keys() - shared.keys():
            raise ValueError(f"`methods.{method}.lora` has {sorted(unknown)}; it takes: {', '.join(shared)}.")
        return shared | own
