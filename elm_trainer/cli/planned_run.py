"""What `elm doctor` looks at: an erasure before it runs, without the model's weights."""

import shutil
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..checks import number_range
from .erase_options import ErasureArguments
from .errors import check_dtype


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .. import Concept, ElmConfig
    from ..fitting import FittedSettings
    from ..rehearsal import Prediction
    from .concept import ConceptRun, PlannedTexts
    from .options import CommandLine

# The Hub is given up after so many seconds; the libraries' own patience is ten times that.
HUB_SECONDS = 4.0


@dataclass
class DoctorArguments(ErasureArguments):
    """The options of `elm erase`, and what to plan for."""

    memory: float | None = field(
        default=None, metadata={"help": "GB of memory to plan for, in place of what is free here."}
    )


class Hub(NamedTuple):
    """Whether the Hub answers, and who is signed in.

    Attributes:
        reachable (`bool`): Whether it has answered.
        text (`str`): Where it is, or why it does not answer.
        token (`bool`): Whether there is a token.
    """

    reachable: bool
    text: str
    token: bool


class PlannedRun:
    """An erasure before it runs: each part is made when it is first looked at, and then kept.

    Args:
        arguments ([`DoctorArguments`]): Options of the run.
        config ([`ElmConfig`]): Settings of its training.
        made ([`ConceptRun`], *optional*): Where its texts are made for a `concept`.
    """

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
            plan = run.planned
            made.fit_texts(run.texts["forget"], run.tokenizer, plan.kind)
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

    @property
    def _place(self) -> dict[str, Any]:
        chosen = self.arguments
        found = {"revision": chosen.model_revision, "gguf_file": chosen.gguf_file}
        # The libraries try again for half a minute where nobody answers.
        return found | {"local_files_only": self.is_on_hub and not self.hub.reachable}

    @cached_property
    def loaded(self) -> "tuple[PreTrainedConfig, PreTrainedTokenizerBase | Exception]":
        """The config of the model, and its tokenizer, or why there is none."""
        from ..gguf_files import reading_gguf_once
        from ..modeling import load_config, load_tokenizer

        with reading_gguf_once():
            model = load_config(self.arguments.model, **self._place)
            try:
                return model, load_tokenizer(self.arguments.model, **self._place)
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
    def planned(self) -> "PlannedTexts":
        """The texts of a run for which they are made."""
        assert self.made is not None
        return self.made.planned_texts(self.tokenizer)

    @property
    def sources(self) -> list[str]:
        """Names of all that texts are read from."""
        if self.made is None:
            named = [*self.arguments.forget, *self.arguments.retain]
        else:
            what = self.made.made_from
            named = [
                *map(str, what.documents),
                *([str(what.facts)] if what.facts else []),
                *map(str, (*what.near, *what.retain)),
            ]
        return list(dict.fromkeys(named))

    @property
    def forget(self) -> list[str]:
        """Names of the forget sources among `texts`."""
        return self.arguments.forget if self.made is None else ["forget"]

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
        from .. import ConceptSources, build_erasure_dataset

        if self.made is None:
            sources = self.arguments.sources(self.concepts, self.texts.__getitem__)
        else:
            retain = [texts for name, texts in self.texts.items() if name != "forget"]
            sources = {self.made.concept: ConceptSources(self.texts["forget"], retain)}
        return build_erasure_dataset(
            sources,
            size=self.arguments.dataset_size,
            characters=number_range("characters", self.arguments.characters),
            processing_class=self.tokenizer,
            seed=self.config.seed,
        )

    @cached_property
    def device(self) -> "torch.device":
        return self.config.device

    @cached_property
    def free(self) -> int:
        """Free bytes of the device."""
        from ..fitting import free_memory

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

    @cached_property
    def fitted(self) -> "FittedSettings":
        from ..fitting import fitting_settings

        return fitting_settings(self.model, memory=self.free, device=self.device)


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
