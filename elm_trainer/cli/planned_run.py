"""What `elm doctor` looks at: an erasure before it runs, without the model's weights."""

import shutil
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .erase_options import ErasureArguments
from .options import check_dtype


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .. import Concept, ElmConfig
    from ..rehearsal import Prediction
    from .concept import ConceptRun
    from .options import CommandLine

# The Hub is given up after so many seconds; the libraries' own patience is ten times that.
HUB_SECONDS = 4.0
# Share of the texts that a model writes which is kept, for a plan (docs/recipes.md).
_KEPT = 2 / 3


@dataclass
class DoctorArguments(ErasureArguments):
    """The options of `elm erase`, and what to plan for."""

    memory: float | None = field(
        default=None, metadata={"help": "GB of memory to plan for, in place of what is free here."}
    )


class Hub(NamedTuple):
    """Whether the Hub answers, and somebody is signed in."""

    reachable: bool
    text: str  # where it is, or why it does not answer
    token: bool


class PlannedTexts(NamedTuple):
    """What texts a run will have, as far as that is known before a model writes."""

    texts: "dict[str, Dataset]"  # by name, those about the concept as "forget"; all others are retain texts
    note: str  # what is not there yet, and how it is planned
    kind: dict[str, bool]  # what `objective_settings` wants to know of them


class PlannedRun:
    """An erasure before it runs, whose texts are `made` where there is a `concept`: each part is made when it is first looked at."""

    def __init__(self, arguments: DoctorArguments, config: "ElmConfig", made: "ConceptRun | None" = None):
        self.arguments, self.config, self.made = arguments, config, made
        self.unchosen: Exception | None = None  # why settings could not be chosen

    @classmethod
    def of(cls, line: "CommandLine") -> "PlannedRun":
        """The run of a command line; for a `concept` with the settings that `elm erase` would choose, as far as they can be."""
        from .concept import ConceptRun

        if line.early()[0].concept is None:
            return cls(*line.complete())
        made = ConceptRun(line)
        run = cls(cast(DoctorArguments, made.arguments), made.config, made)
        unchosen = None
        try:
            made.fit_model(run.model, run.free if run.arguments.memory else None)
            made.fit_texts(run.texts["forget"], run.tokenizer, run.planned.kind)
        except Exception as error:  # which is for a line of the page
            unchosen = error
        fitted = cls(cast(DoctorArguments, made.arguments), made.config, made)
        fitted.unchosen = unchosen
        kept = ("hub", "loaded", "planned")
        vars(fitted).update({name: value for name, value in vars(run).items() if name in kept})
        return fitted

    @cached_property
    def hub(self) -> Hub:
        return ask_hub()

    @property
    def is_on_hub(self) -> bool:
        """Whether the model is a repository on the Hub."""
        from ..modeling import PACKAGED_MODELS

        return self.arguments.model not in PACKAGED_MODELS and not Path(self.arguments.model).exists()

    @cached_property
    def loaded(self) -> "tuple[PreTrainedConfig, PreTrainedTokenizerBase | Exception]":
        """The config of the model, and its tokenizer, or why there is none."""
        from ..modeling import load_config, load_tokenizer, reading_gguf_once

        given = self.arguments
        # The libraries try again for half a minute where nobody answers.
        offline = self.is_on_hub and not self.hub.reachable
        place: dict[str, Any] = dict(
            revision=given.model_revision, gguf_file=given.gguf_file, local_files_only=offline
        )
        with reading_gguf_once():
            model = load_config(given.model, **place)
            try:
                return model, load_tokenizer(given.model, **place)
            except Exception as error:
                return model, error

    @property
    def model_config(self) -> "PreTrainedConfig":
        return self.loaded[0]

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        if isinstance(self.loaded[1], Exception):
            raise self.loaded[1]
        return self.loaded[1]

    @cached_property
    def dtype(self) -> "torch.dtype":
        """Data type of the weights, as `load_model` takes them."""
        import torch

        given = self.arguments.dtype
        check_dtype(given)
        if given != "auto":
            return getattr(torch, given)
        return self.model_config.get_text_config().dtype or torch.float32

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The model without weights."""
        from ..fitting import empty_model

        return empty_model(self.model_config, self.dtype)

    @cached_property
    def lora(self) -> "LoraConfig":
        given = self.arguments
        if self._readout is not None:
            given = replace(given, lora_layers=str(self._readout))
        return given.lora(self.model)

    @property
    def _readout(self) -> int | None:
        """The layer that is planned for where it is yet to be found."""
        from ..fitting import AUTO, expected_readout

        if self.arguments.lora_layers != AUTO:
            return None
        return expected_readout(self.model_config.get_text_config().num_hidden_layers)

    @cached_property
    def adapted(self) -> "nn.Module":
        """The model with its adapter, without weights."""
        from ..rehearsal import adapted

        return adapted(self.model_config, self.lora, self.dtype)

    @cached_property
    def concepts(self) -> "dict[str, Concept]":
        return self.arguments.load_concepts(self.config.concepts)

    @cached_property
    def planned(self) -> PlannedTexts:
        """The texts of a run for which they are made, as it will find or make them. Nothing is written."""
        from .. import load_texts
        from ..files import read_object
        from ..making.make import FOLDER, RECORD, kind_of_texts

        assert self.made is not None
        what, folder = self.made.made_from, Path(self.config.output_dir) / FOLDER
        if self.arguments.checkpoint(self.config) and (folder / RECORD).exists():
            record = read_object(folder / RECORD)
            texts = {name: load_texts(folder / f"{name}.jsonl") for name in record["counts"]}
            planned = PlannedTexts(texts, "", kind_of_texts(record))
        else:
            planned = _texts_to_come(self.made, self.tokenizer)
        own = (*what.near, *what.retain)
        planned.texts.update(
            (str(source), load_texts(source, processing_class=self.tokenizer, seed=what.seed)) for source in own
        )
        return planned

    @cached_property
    def texts(self) -> "dict[str, Dataset]":
        """Forget and retain sources by name, each read once."""
        from .. import load_texts

        if self.made is not None:
            return self.planned.texts
        names = dict.fromkeys([*self.arguments.forget, *self.arguments.retain])
        seed = self.config.seed
        return {name: load_texts(name, processing_class=self.tokenizer, seed=seed) for name in names}

    @cached_property
    def dataset(self) -> "Dataset":
        from .. import ConceptSources

        if self.made is None:
            sources = self.arguments.sources(self.concepts, self.texts.__getitem__)
        else:
            retain = [texts for name, texts in self.texts.items() if name != "forget"]
            sources = {self.made.concept: ConceptSources(self.texts["forget"], retain)}
        return self.arguments.dataset(sources, self.tokenizer, self.config.seed)

    @cached_property
    def device(self) -> "torch.device":
        return self.config.device

    @cached_property
    def free(self) -> int:
        """Free bytes of the device."""
        from ..distributed import free_memory

        return int(self.arguments.memory * 1e9) if self.arguments.memory else free_memory(self.device)

    @property
    def targets_dir(self) -> Path:
        from ..methods.targets import default_targets_dir

        return Path(self.config.targets_dir or default_targets_dir())

    @cached_property
    def prediction(self) -> "Prediction":
        import torch

        from ..rehearsal import rehearse

        config = copy(self.config)
        if self._readout is not None and config.state_weight and config.state_layers is None:
            config.state_layers = [self._readout]
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.arguments.matmul_precision)
        try:
            return rehearse(
                self.model_config, config, self.dataset, self.tokenizer, self.lora, dtype=self.dtype,
                attn_implementation=self.arguments.attn_implementation,
                free_disk=shutil.disk_usage(existing(self.targets_dir)).free,
            )  # fmt: skip
        finally:
            torch.set_float32_matmul_precision(before)


def _texts_to_come(made: "ConceptRun", tokenizer: "PreTrainedTokenizerBase") -> PlannedTexts:
    """Texts made from documents and facts, and others of their kind where a model has yet to write."""
    from .. import load_texts
    from ..fitting import objective_settings
    from ..making.facts import ASKED_SHARE, TOLD_SHARE, mostly_alike, relations_read_alike
    from ..making.make import make_data
    from ..making.novices import DRAWS

    given, bare = made.made_from, made.is_bare
    by_terms = bare and find_spec("wordfreq") is not None
    near = 0 if given.near else given.near_texts
    # Whether there will be facts of a mere name is not known yet.
    asked, tells = (share * near if bare or given.facts else 0 for share in (ASKED_SHARE, TOLD_SHARE))
    written = {"forget": (bare + by_terms) * given.texts, "near": near, "asked": asked, "told": tells}
    about = (
        "about it" + " and its terms" * by_terms,
        "about neighbors",
        "questions about what facts name",
        "about what they state",
    )
    told = ", ".join(f"{count} {of}" for count, of in zip(written.values(), about, strict=True) if count)
    note = f"the model is to write {told}, of which two thirds are kept in this plan" if told else ""
    everyday, texts = load_texts("everyday"), dict[str, Any]()
    for name, count in written.items():
        # Of a term there are texts, questions and turns of chat.
        if rows := round(_KEPT * count * (3 if by_terms and name == "forget" else 1)):
            texts[name] = everyday.select([row % len(everyday) for row in range(rows)])
    kind = {"counterfactual": by_terms, "alike": False, "by_terms": by_terms}
    if bare:
        other = objective_settings(1, 1, counterfactual=True, given=made.given).get("objective")
        note += "; whether it knows the name is asked first"
        if other and other.value == "readout":
            note += ", and if it states facts, the objective is readout, not as here"
        if by_terms:
            novices = [[f"Tolm {text}"] * DRAWS for text in texts["forget"]["text"]]
            texts["forget"] = texts["forget"].add_column("novices", novices)
        if not given.retain:
            texts["retain"] = everyday
    else:
        what = replace(given, near_texts=0)
        with TemporaryDirectory() as place:
            data = make_data(what, None, tokenizer, place)
            texts |= {name: load_texts(data.folder / f"{name}.jsonl") for name in data.record["counts"]}
        facts, _ = what.read()
        kind["counterfactual"] = data.counterfactual
        kind["alike"] = not what.documents and mostly_alike(facts, relations_read_alike(facts))
    return PlannedTexts(texts, note, kind)


def ask_hub(seconds: float = HUB_SECONDS) -> Hub:
    """Ask the Hub for a sign of life, without trying again."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    from ..hub.errors import first_line

    token = get_token() is not None
    if constants.HF_HUB_OFFLINE:
        return Hub(False, "offline by HF_HUB_OFFLINE", token)
    answer: list[str] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
            answer.append("")
        except Exception as error:
            answer.append(first_line(error))

    # Names are looked up without a limit of time.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    told = answer[0] if answer else f"no answer in {seconds:g} s"
    return Hub(told == "", f"{constants.ENDPOINT} {'answers' if told == '' else f'is not reached: {told}'}", token)


def existing(path: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
