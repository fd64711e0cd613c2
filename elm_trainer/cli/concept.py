"""`elm erase --concept NAME`: texts are made from what the user has, and settings chosen that were not given."""

import logging
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..checks import hushed
from ..concept import described_concept
from .options import CommandLine


if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .. import Concept, ElmConfig
    from ..fitting import Choice
    from ..making.knowledge import Familiarity
    from ..making.make import MadeData, MadeFrom
    from ..making.writer import Writer
    from .erase_options import ErasureArguments

logger = logging.getLogger(__name__)
CHOSEN_FILE = "chosen.yaml"
# Tokens of all texts of a row, where documents give passages of up to a thousand characters.
_ROW_TOKENS = 512


def default_folder(concept: str) -> str:
    """Where a run goes whose `output_dir` is left out: `outputs/` and the concept's name in lower case."""
    words = re.findall(r"\w+", described_concept(concept).name.lower())
    return f"outputs/{'-'.join(words) or 'concept'}"


def settle_layers(
    arguments: "ErasureArguments",
    config: "ElmConfig",
    model: "PreTrainedModel",
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
) -> bool:
    """Find the layers where `lora_layers` is `auto`, and say whether that was so.

    What is found takes its place in the options, is said, and is written beside what else was chosen, where a run that goes on finds
    it. The last of the layers becomes `state_layers` where the state term has none. All processes of a launch must call this.
    """
    from rich.console import Console

    from ..distributed import from_first
    from ..files import write_text
    from ..fitting import AUTO
    from ..methods.placement import find_readout

    if arguments.lora_layers != AUTO:
        return False
    path = Path(config.output_dir) / CHOSEN_FILE
    before = _read_chosen(path) if arguments.checkpoint(config) else {}
    if before.get("lora_layers", AUTO) != AUTO:
        found, why = before, "as the run had it that goes on"
    else:
        if not getattr(model, "is_quantized", False):
            model.to(config.device)
        readout = from_first(find_readout(model, dataset, tokenizer))
        found, why = {"lora_layers": readout.lora_layers, "state_layers": readout.layers[-1:]}, readout.reason
    arguments.lora_layers = str(found["lora_layers"])
    told = f"lora_layers {arguments.lora_layers}"
    if config.state_weight and config.state_layers is None:
        config.state_layers = list(found["state_layers"])
        told += f", state_layers {config.state_layers}"
    if config.process_index == 0:
        Console().print(f"{told}: {why}.", markup=False, highlight=False, soft_wrap=True)
        kept = _read_chosen(path) | {name: found[name] for name in ("lora_layers", "state_layers") if name in found}
        write_text(path, yaml.safe_dump(kept, sort_keys=False))
    return True


def _read_chosen(path: Path) -> dict[str, Any]:
    """What an earlier call has chosen, if there was one."""
    if not path.exists():
        return {}
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no mapping: delete it to have the settings chosen anew.")
    return found


class ConceptRun:
    """The options of an erasure from a name; what was not given is chosen when that can be done.

    Raises `ValueError` for a value that the config or the libraries below it refuse, and `OSError` if what an earlier call has chosen
    cannot be read.
    """

    arguments: "ErasureArguments"
    config: "ElmConfig"
    chosen: "dict[str, Choice]"  # so far, by name of the option

    def __init__(self, line: CommandLine):
        from ..fitting import Choice

        self._line = line
        self._known: list[Familiarity] | None = None
        self._attention, self._depth = list[str](), 0
        self.chosen = {}
        arguments, _ = line.early()
        self._choose({"output_dir": Choice(default_folder(arguments.concept), "by the concept's name")})

    def _choose(self, found: "Mapping[str, Choice]") -> None:
        """Take what was found for options that are not given; a run that goes on keeps what it had."""
        from ..fitting import Choice

        for name, choice in found.items():
            if name in self._before:
                choice = Choice(self._before[name], "as the run had it that goes on")
            if name not in self._line.given:
                self.chosen[name] = choice
        # Precision and objective are chosen later: the default of `bf16` would be warned of, and states need such a novice.
        values: dict[str, Any] = {"bf16": False}
        arguments, common = self._line.early()
        states = arguments.objective in (None, "readout", "terms") and common.retain_loss == "states"
        if {"state_weight", "state_names", "erase_after"} & self._line.given or states:
            values |= {"novice": "counterfactual", "state_weight": 1.0}
        values |= {name: choice.value for name, choice in self.chosen.items()}
        self.arguments, self.config = self._line.complete(values)

    @cached_property
    def _before(self) -> dict[str, Any]:
        """What an earlier call has chosen, if this one goes on with its run."""
        arguments, common = self._line.early()
        path = Path(common.output_dir or default_folder(arguments.concept)) / CHOSEN_FILE
        return _read_chosen(path) if arguments.checkpoint(common) else {}

    @cached_property
    def given(self) -> dict[str, Any]:
        """What was given, by name."""
        found = {name: getattr(self.arguments, name, getattr(self.config, name, None)) for name in self._line.given}
        # Settings that have two names, or exclude each other.
        if "gradient_checkpointing" in found:
            found["activation_checkpointing"] = self.config.activation_checkpointing
        if found.get("fp16"):
            found["bf16"] = False
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def made_from(self) -> "MadeFrom":
        """What the user has."""
        from ..making.make import MadeFrom

        given = self.arguments
        return MadeFrom(
            str(given.concept),
            documents=given.documents or (),
            facts=given.facts,
            retain=given.retain if "retain" in self._line.given else (),
            near=given.near or (),
            seed=self.config.seed,
        )

    @property
    def concept(self) -> "Concept":
        """What is erased."""
        return described_concept(str(self.arguments.concept))

    @property
    def is_bare(self) -> bool:
        """Whether there is only a name."""
        return not self.made_from.documents and self.made_from.facts is None

    def check(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise what is wrong with documents, facts, other sources and settings before a model is loaded."""
        from .. import load_texts
        from ..fitting import objective_settings

        what = self.made_from
        expected = objective_settings(1, 1, counterfactual=True, given=self.given)
        self._line.complete({"bf16": False} | {name: choice.value for name, choice in expected.items()})
        with hushed():
            what.read()
            for source in (*what.near, *what.retain):
                load_texts(source, processing_class=tokenizer, seed=what.seed)

    def check_known(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise `UnknownConceptError` where there is only a name that the model has never heard of, and no texts about it yet."""
        from ..making.knowledge import check_known
        from ..making.make import FOLDER

        there = self.arguments.checkpoint(self.config) and (Path(self.config.output_dir) / FOLDER).exists()
        if self.is_bare and not there:
            self._known = check_known(model, tokenizer, self.concept, seed=self.config.seed)

    def fit_model(self, model: "PreTrainedConfig | PreTrainedModel", memory: int | None = None) -> None:
        """Choose what depends on the model and the machine, with so many bytes of `memory` in place of what is free."""
        import torch

        from ..distributed import from_first
        from ..fitting import OPTIONS, attention_modules, empty_model, fitting_settings, machine_settings
        from ..modeling import decoder_layers

        self.arguments.check_layers()
        given = {name: value for name, value in self.given.items() if name in OPTIONS}
        config: Any = getattr(model, "config", model)
        if given.get("dtype") == "auto":
            given["dtype"] = str(config.get_text_config().dtype or torch.float32).removeprefix("torch.")
        device = self.config.device
        more = {"row_tokens": _ROW_TOKENS} if self.made_from.documents else {}
        fitted = fitting_settings(model, memory=memory, device=device, given=given, **more)
        # Free memory may differ between processes, and their settings must not.
        found = from_first(machine_settings(fitted, device))
        layers = decoder_layers(empty_model(config))
        self._attention, self._depth = attention_modules(layers), len(layers)
        self._choose({name: choice for name, choice in found.items() if name not in given})

    def fit_texts(self, forget: "Dataset", tokenizer: "PreTrainedTokenizerBase", kind: Mapping[str, bool]) -> None:
        """Choose objective, rows, steps and length, after [`fit_model`]. `kind` is that of [`kind_of_texts`]."""
        from ..fitting import Choice, objective_settings

        longest = max(len(ids) for ids in tokenizer(forget["text"][:], add_special_tokens=True)["input_ids"])
        given, before = self.given, self._before
        if before:
            # A run whose objective was given, or of an earlier version, shows it by its settings.
            kinds = {"terms": "state_names", "readout": "state_weight", "log-space": "log_tokens"}
            shown = next((name for name, setting in kinds.items() if before.get(setting)), "contexts")
            given = {"objective": before.get("objective", shown)} | given
        found = objective_settings(
            len(forget), longest, given=given, attention=self._attention, depth=self._depth, **kind
        )
        if before:
            found["objective"] = Choice(given["objective"], "as the run had it that goes on")
        # What was found in the model for `auto`.
        if "state_layers" in before:
            found["state_layers"] = Choice(before["state_layers"], "")
        self._choose(found)

    def make(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> "MadeData":
        """Make the texts, or find those of an earlier call, and choose what depends on them.

        All processes of a launch must call this. Raises what [`make_data`] raises.
        """
        from .. import load_texts
        from ..files import write_text
        from ..making.make import kind_of_texts, make_data

        output = Path(self.config.output_dir)
        with self.config.main_process_first():
            made = make_data(self.made_from, model, tokenizer, output, writer=self._writer, known=self._known)
            forget = load_texts(made.sources.forget)
        self.fit_texts(forget, tokenizer, kind_of_texts(made.record))
        with self.config.main_process_first():
            if self.config.local_process_index == 0:
                values = {name: choice.value for name, choice in self.chosen.items()}
                write_text(output / CHOSEN_FILE, yaml.safe_dump(values, sort_keys=False))
        return made

    def ask(self, made: "MadeData", model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> str | None:
        """Make questions about the concept, and say in which folder they are; `None`, with a warning, where there are none to ask.

        All processes of a launch must call this.
        """
        from rich.console import Console

        from ..making.questions import NoQuestionsError, make_questions

        with self.config.main_process_first():
            try:
                questions = make_questions(
                    self.made_from, made, model, tokenizer, self.config.output_dir, writer=self._writer
                )
            except NoQuestionsError as error:
                logger.warning(f"What is erased will not be measured: {error}")
                return None
        if self.config.process_index == 0:
            Console().print(questions.summary(), markup=False, highlight=False)
        return str(questions.folder)

    @cached_property
    def _writer(self) -> "Writer | None":
        """Who writes in the model's place."""
        from ..making.writer import load_writer

        name = self.arguments.writer
        cache = Path(self.config.output_dir) / "making"
        return load_writer(name, cache_dir=cache, device=self.config.device) if name else None

    def show(self, console: "Console") -> None:
        """Print what was chosen and why, settings of one reason in a line."""
        from rich.markup import escape
        from rich.table import Table

        lines: dict[str, list[str]] = {}
        for name, (value, reason) in self.chosen.items():
            lines.setdefault(reason, []).append(f"{name} {value}")
        table = Table("chosen", "because", box=None, padding=(0, 2, 0, 0), header_style="bold")
        for reason, some in lines.items():
            table.add_row(escape(", ".join(some)), escape(reason))
        console.print(table)
        console.print("Each is an option, and what you give stays.", style="dim")
