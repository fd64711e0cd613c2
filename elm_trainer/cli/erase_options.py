"""The options of `elm erase`: what is erased from which model, and the most used settings of training."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks import check_numbers, number_range
from ..concept import described_concept
from .options import CommandLine


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .. import Concept, ConceptSources, ElmConfig, EvaluationSuite
    from ..data.user_sources import Source

# What the texts of `concept` are made from.
_ABOUT_CONCEPT = ("documents", "facts", "near", "writer")
# The names of `OBJECTIVES` of fitting.py, which imports torch.
_OBJECTIVES = ["readout", "terms", "log-space", "contexts"]


@dataclass
class ErasureArguments:
    """What is erased from which model; the settings of training are those of `ElmConfig`."""

    model: str = field(default="smollm2-135m-instruct", metadata={"help": "Hub id, folder, GGUF file or demo model."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch on the Hub."})
    gguf_file: str | None = field(default=None, metadata={"help": "File in the repository, if it is a GGUF file."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2 or other."}
    )
    matmul_precision: str = field(
        default="highest",
        metadata={
            "help": "Of float32 products; medium multiplies in bfloat16.",
            "choices": ["highest", "high", "medium"],
        },
    )
    concept: str | None = field(
        default=None, metadata={"help": "'NAME' or 'NAME: keyword, keyword': texts are made, settings chosen."}
    )
    documents: list[str] | None = field(default=None, metadata={"help": "Folders and files about the concept."})
    facts: str | None = field(default=None, metadata={"help": "Table of facts: subject, relation, answer."})
    near: list[str] | None = field(default=None, metadata={"help": "Sources of texts about the concept's neighbors."})
    writer: str | None = field(
        default=None,
        metadata={"help": "Model or server that states facts and asks questions; the model itself by default."},
    )
    objective: str | None = field(
        default=None, metadata={"help": "Settings that are chosen for a concept.", "choices": _OBJECTIVES}
    )
    forget: list[str] = field(default_factory=lambda: ["capitals"], metadata={"help": "Forget source per concept."})
    retain: list[str] = field(default_factory=lambda: ["everyday"], metadata={"help": "Retain sources."})
    own_retain: bool = field(
        default=False, metadata={"help": "Whether there is one retain source per concept, in order, not all for each."}
    )
    characters: str | None = field(
        default=None,
        metadata={"help": "Range of texts' lengths in characters: shorter ones drop, longer ones are cut."},
    )
    dataset_size: int = field(default=512, metadata={"help": "Rows per concept, times its share."})
    shares: list[int] | None = field(
        default=None, metadata={"help": "Rows of each concept in a turn, such as 2 1; one of each by default."}
    )
    synthetic: list[str] | None = field(
        default=None, metadata={"help": "Source of synthetic pairs per concept, or none."}
    )
    synthetic_size: int = field(default=0, metadata={"help": "Pairs to sample per concept without a source."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Alpha of the adapter."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter."})
    lora_layers: str | None = field(default=None, metadata={"help": "Adapted layers, such as 4-7, or auto."})
    lora_targets: str = field(default="all-linear", metadata={"help": "Modules, comma-separated, or all-linear."})
    evaluate: bool = field(default=True, metadata={"help": "Measure before and after."})
    bank: list[str] | None = field(
        default=None, metadata={"help": "Question bank per concept; none for the built-in one."}
    )
    questions: int = field(default=120, metadata={"help": "Questions per bank."})
    measures: list[str] | None = field(
        default=None, metadata={"help": "What is measured; all but a look inside by default."}
    )
    dev_every: int = field(default=0, metadata={"help": "Steps between two looks at the dev questions."})
    dev_stop: float | None = field(
        default=None, metadata={"help": "Worst dev accuracy (PMI) at which training stops."}
    )
    keep_best: bool = field(default=False, metadata={"help": "Keep the step that was best on the dev questions."})
    resume: bool = field(default=False, metadata={"help": "Go on with the run in output_dir."})
    overwrite: bool = field(default=False, metadata={"help": "Remove an earlier run from output_dir."})

    def __post_init__(self):
        rules = (
            ("at least 0", ("synthetic_size", "dev_every", "lora_alpha")),
            ("at least 1", ("dataset_size", "lora_rank", "questions")),
            ("from 0 to 1", ("lora_dropout", "dev_stop")),
        )
        check_numbers(self, rules)
        number_range("characters", self.characters)
        if self.objective not in (None, *_OBJECTIVES):
            raise ValueError(f"`objective` is {self.objective!r}: use one of {', '.join(_OBJECTIVES)}.")
        if self.keep_best and not self.dev_every:
            raise ValueError("`keep_best` is True without `dev_every`: set that to the steps between two looks.")

    def check_given(self, given: Collection[str]) -> None:
        """Raise `ValueError` for options that do not go together, by the names of those that were given."""
        if self.concept is None:
            if lonely := [name for name in _ABOUT_CONCEPT if getattr(self, name) is not None]:
                raise ValueError(
                    f"`{lonely[0]}` is {getattr(self, lonely[0])!r}, but texts are made for a `concept`: give `--concept NAME`, "
                    "or put the source into `forget` or `retain`."
                )
            if self.objective is not None:
                raise ValueError(
                    f"`objective` is {self.objective!r}, but settings are chosen for a `concept`: give `--concept NAME`, or set them "
                    "one by one, as the recipes do."
                )
            return
        described_concept(self.concept)
        if both := [name for name in ("concepts", "forget") if name in given]:
            raise ValueError(
                f"`concept` is {self.concept!r}, whose texts are made, but `{both[0]}` is given too: leave one of them out; "
                "texts of your own are `--documents`."
            )

    def checkpoint(self, settings: "CommonSettings | ElmConfig") -> str | bool | None:
        """The checkpoint from which a run goes on, `True` for its last; `None` for a run that begins."""
        return settings.resume_from_checkpoint or self.resume or None

    def lora(self, model: "PreTrainedModel") -> "LoraConfig":
        """The adapter of a model."""
        from ..modeling import lora_config

        return lora_config(
            model,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            targets=self.lora_targets,
            layers=self.lora_layers,
        )

    def check_layers(self, novice: str | None = None) -> None:
        """Raise `ValueError` for `lora_layers` that name none, or that cannot be found with such a `novice`."""
        from ..fitting import AUTO
        from ..modeling import layer_range

        if self.lora_layers != AUTO:
            layer_range(self.lora_layers)
        elif novice not in (None, "counterfactual"):
            raise ValueError(
                f"`lora_layers` is 'auto' with `novice={novice!r}`: layers are found by what counterfactual novices lack, so name some, "
                'or set `novice="counterfactual"`.'
            )

    def load_concepts(self, names: list[str] | None) -> dict[str, "Concept"]:
        """The erased concepts by name, once there is for each what is given for each."""
        from ..concept import concept_presets, load_concept
        from ..data.facts import FACTS

        if self.concept is None and names is None and any(source not in concept_presets() for source in self.forget):
            raise ValueError(
                f"`concepts` is None and `forget` {self.forget}: name the concept of each source, such as `--concepts brannock "
                "--forget texts.jsonl`."
            )
        if self.concept is not None:
            found = [described_concept(self.concept)]
        else:
            found = [load_concept(name) for name in names or self.forget]
        concepts = {concept.name: concept for concept in found}
        for name in ("forget", *(["retain"] if self.own_retain else []), "shares", "synthetic", "bank"):
            given = getattr(self, name)
            if given is not None and len(given) != len(concepts):
                raise ValueError(
                    f"`{name}` is {given}, but the concepts are {list(concepts)}: give one for each, in order."
                )
        asks = self.bank is not None or (self.concept is not None and self.evaluate)
        if self.dev_every and not asks and (own := [name for name in concepts if name not in FACTS]):
            raise ValueError(
                f"`dev_every` is {self.dev_every}, but no dev questions about {own} are built in: set it to 0, or give a folder of "
                "questions as `bank`."
            )
        return concepts

    def sources(
        self, concepts: Iterable[str], read: "Callable[[str], Source]" = str
    ) -> "dict[str | Concept, ConceptSources]":
        """The sources of each concept; `read` gives what stands for a source of texts, which is its name by default."""
        from .. import ConceptSources

        pairs, shares = self.synthetic or ["none"] * len(self.forget), self.shares or [1] * len(self.forget)
        retains = [[source] for source in self.retain] if self.own_retain else [self.retain] * len(self.forget)
        return {
            name: ConceptSources(
                read(forget), list(map(read, retain)), None if given == "none" else given, share=share
            )
            for name, forget, retain, given, share in zip(concepts, self.forget, retains, pairs, shares, strict=True)
        }

    def dataset(
        self, sources: "dict[str | Concept, ConceptSources]", tokenizer: "PreTrainedTokenizerBase", seed: int
    ) -> "Dataset":
        """The rows of the training."""
        from .. import build_erasure_dataset

        return build_erasure_dataset(
            sources,
            size=self.dataset_size,
            characters=number_range("characters", self.characters),
            processing_class=tokenizer,
            seed=seed,
        )

    def asked(self, concepts: Iterable[str]) -> "tuple[EvaluationSuite, list[str]] | None":
        """The questions about the concepts, and what is measured; `None` without an evaluation."""
        from ..evaluation.measures import MEASURES, measurable
        from ..evaluation.suite import suite_from_files

        if not self.evaluate:
            return None
        suite = suite_from_files(list(concepts), self.bank, self.questions)
        return suite, measurable(self.measures or list(MEASURES), suite)

    def dev_suite(self, concepts: Iterable[str], questions: int = 60) -> "EvaluationSuite":
        """The questions that are asked during training: the dev split of built-in ones, and of the folders in `bank`.

        Raises `ValueError` for a concept that has neither. A file of questions belongs to the report alone.
        """
        from ..data.facts import FACTS
        from ..evaluation.suite import suite_from_files

        names = list(concepts)
        banks = [path if Path(path).is_dir() else "none" for path in self.bank or ["none"] * len(names)]
        if lacking := [name for name, path in zip(names, banks, strict=True) if path == "none" and name not in FACTS]:
            raise ValueError(
                f"`dev_every` is {self.dev_every}, but {lacking[0]!r} has no questions of a dev split: give a folder that "
                "`make_questions` wrote as `bank`, or leave it out."
            )
        return suite_from_files(names, banks, questions, split="dev")


@dataclass
class CommonSettings:
    """The most used fields of `ElmConfig`, as `--help` shows them without the seconds that its import takes."""

    _argument_group_name = "of training, the most used ones"

    concepts: list[str] | None = field(default=None, metadata={"help": "Presets or YAML files of the concepts."})
    output_dir: str | None = field(default=None, metadata={"help": "Where adapter, report and checkpoints go."})
    max_steps: int = field(default=-1, metadata={"help": "Steps; by num_train_epochs if negative."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate at its highest."})
    warmup_steps: float = field(default=0, metadata={"help": "Steps over which it rises."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows per step and process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per step."})
    max_length: int | None = field(default=1024, metadata={"help": "Longest text in tokens."})
    seed: int = field(default=42, metadata={"help": "Seed of data, weights and order."})
    preset: str = field(
        default="paper", metadata={"help": "Where left-out fields come from.", "choices": ["paper", "released"]}
    )
    eta: float | None = field(default=None, metadata={"help": "Strength of the erasure (of the first token)."})
    erase_weight: float = field(default=1.0, metadata={"help": "Weight of the erase term."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term."})
    consistency_weight: float = field(default=1.0, metadata={"help": "Weight of the consistency term."})
    retain_loss: str | None = field(
        default=None, metadata={"help": "Retain term.", "choices": ["kl", "argmax", "log", "states"]}
    )
    novice: str = field(
        default="contexts", metadata={"help": "What the novice is.", "choices": ["contexts", "counterfactual"]}
    )
    bf16: bool | None = field(default=None, metadata={"help": "Compute in bfloat16; by default where the device can."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave the GPU alone."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(default="steps", metadata={"help": "When checkpoints are saved: no, steps or epoch."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "Checkpoint to go on from."})
    push_to_hub: bool = field(default=False, metadata={"help": "Publish adapter and report at the end."})


def erasure_line(
    command: str, argv: Sequence[str] | None, about: str = "", own: type[ErasureArguments] = ErasureArguments
) -> CommandLine:
    """The command line of `elm erase`, or of another subcommand with the same options."""
    return CommandLine(command, about, argv, own=own, config="elm_trainer.ElmConfig", common=CommonSettings)


def check_folder(folder: Path) -> None:
    """Raise `ValueError` where a folder holds an earlier run."""
    found = [name for name in ("adapter", "data", "making") if (folder / name).exists()]
    found += sorted(path.name for path in folder.glob("checkpoint-*"))
    if found:
        what = "a finished run" if "adapter" in found else "a run that was stopped"
        raise ValueError(
            f"`output_dir` is {str(folder)!r}, which holds {what} ({', '.join(found)}): `--resume` goes on with it, "
            "`--overwrite` removes it, or name another folder."
        )
