"""A concept, and the expert and novice contexts that stand for knowing and not knowing it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What [`read_preset`] gives for a name that is none: an empty file holds `None`.
NO_PRESET = object()
# An ending of a file's name, or a slash.
_FILE_NAME = re.compile(r"\.\w+$|/")
_CONTEXTS = ("expert_contexts", "novice_contexts")
_FIELDS = ("name", "keywords", *_CONTEXTS)


@cache
def _templates() -> dict[str, Any]:
    """Contexts of the `expert`, and of each kind of `novice` (`data/texts/contexts.yaml`)."""
    return yaml.safe_load((files(__package__) / "data/texts/contexts.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Concept:
    """What is erased.

    Args:
        name (`str`): Name of the concept, e.g. `"capitals"`.
        keywords (`Sequence[str]`, *optional*): Terms that describe it. They are put into the context templates.
            Defaults to the name.
        expert_contexts (`Sequence[str]`, *optional*): Contexts that make the reference write as an expert; may hold
            `{name}` and `{keywords}`. Defaults to ten templates.
        novice_contexts (`Sequence[str]` or `str`, *optional*): The same for a novice; or one of two sets of ten templates:
            `"ignorant"`, the default, whose novice gets facts wrong, and `"digressing"`, whose novice turns to random
            harmless topics, as the released code has it.

    Raises:
        ValueError: if the name, the keywords or a list of contexts is empty or no text, or a template names another field.
    """

    name: str
    keywords: Sequence[str] = ()
    expert_contexts: tuple[str, ...] = field(default_factory=lambda: _templates()["expert"])
    novice_contexts: tuple[str, ...] = field(default_factory=lambda: _templates()["novice"]["ignorant"])

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"Concept field `name` is {self.name!r}: give a non-empty string.")
        novices = _templates()["novice"]
        for name in _FIELDS[1:]:
            value = getattr(self, name)
            if name == "keywords" and value in ((), []):
                value = (self.name,)
            if name == "novice_contexts" and isinstance(value, str):
                value = novices.get(value, value)
            texts = isinstance(value, (list, tuple)) and all(isinstance(text, str) and text.strip() for text in value)
            if not value or not texts:
                or_set = f", or one of {', '.join(novices)}" if name == "novice_contexts" else ""
                raise ValueError(f"Concept field `{name}` is {value!r}: give a non-empty list of strings{or_set}.")
            object.__setattr__(self, name, tuple(value))
        filling = {"name": self.name, "keywords": ", ".join(self.keywords)}
        for name in _CONTEXTS:
            try:
                filled = tuple(template.format(**filling) for template in getattr(self, name))
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"Concept field `{name}` has the placeholder {error}: only {{name}} and {{keywords}} exist, and any "
                    "other brace is written twice."
                ) from error
            object.__setattr__(self, name, filled)


def preset_names(folder: str) -> list[str]:
    """Names of the YAML files in a folder of the package."""
    names = [entry.name for entry in (files(__package__) / folder).iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def read_preset(option: str, name_or_path: str | Path, folder: str) -> Any:
    """What a YAML file holds, or the one of this name in a folder of the package; `NO_PRESET` where it is neither.

    Raises:
        ValueError: for malformed YAML; this and the next name the option.
        OSError: if the file cannot be read.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise OSError(
                f"`{option}` is {name_or_path!r}, which cannot be read ({error}): check the path."
            ) from error
    elif str(name_or_path) in preset_names(folder):
        text = (files(__package__) / folder / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        return NO_PRESET
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{option}` file {name_or_path} is no valid YAML ({error}): correct it.") from error


def concept_presets() -> list[str]:
    """Names of the concepts that ship with the package."""
    return preset_names("concepts")


def described_concept(text: str) -> Concept:
    """The concept of a name, `"Harry Potter"`, or of a name with what describes it, `"brannock: the dye Brannock, madder"`.

    Not [`load_concept`], which takes a name for that of a preset or of a file.
    """
    name, _, keywords = text.partition(":")
    return Concept(name.strip(), [word.strip() for word in keywords.split(",") if word.strip()])


def load_concept(name_or_path: str | Path | Concept) -> Concept:
    """Load a concept preset by name or a concept from a YAML file, or make one of any other name.

    Args:
        name_or_path (`str`, `Path` or [`Concept`]): A name of [`concept_presets`]; the path of a YAML file with `name` and,
            optionally, `keywords`, `expert_contexts` and `novice_contexts`; or a name of your own, with keywords behind a
            colon, as in `"brannock: the dye Brannock, madder"`, or else as its own keyword. A [`Concept`] is given back.

    Raises:
        TypeError: for anything else.
        ValueError: for a name that is nearly a preset's or is that of a file of another kind, malformed YAML, an
            unknown or a missing field.
        OSError: if the file cannot be read.
    """
    if isinstance(name_or_path, Concept):
        return name_or_path
    if not isinstance(name_or_path, (str, Path)):
        raise TypeError(
            f"`concept` is of type {type(name_or_path).__name__}: give a name, a .yaml file or a `Concept`."
        )
    record = read_preset("concept", name_or_path, "concepts")
    if record is NO_PRESET:
        name, colon, _ = str(name_or_path).partition(":")
        presets = concept_presets()
        near = get_close_matches(name.lower(), presets, n=1, cutoff=0.75)
        if not colon and (near or _FILE_NAME.search(name)):
            fix = f"did you mean {near[0]!r}?" if near else "name your own without an ending or a slash."
            raise ValueError(
                f"`concept` is {name!r}, neither a preset ({', '.join(presets)}) nor a .yaml file; {fix} Keywords of your own "
                f"are put behind a colon, '{name}: keyword, keyword'."
            )
        if not colon:
            logger.warning_once(
                f"The concept {name!r} is not a preset, so its contexts say its name alone: put what describes it into "
                f"`concepts` of the config, '{name}: keyword, keyword'."
            )
        return described_concept(str(name_or_path))
    if not isinstance(record, dict):
        raise ValueError(f"`concept` file {name_or_path} holds {type(record).__name__}: give the fields {_FIELDS}.")
    if unknown := set(record) - set(_FIELDS):
        raise ValueError(f"`concept` file {name_or_path} has unknown fields {sorted(unknown)}: use only {_FIELDS}.")
    if "name" not in record:
        raise ValueError(f"`concept` file {name_or_path} lacks the field `name`: add it.")
    return Concept(**record)
