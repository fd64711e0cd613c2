"""A concept, and the expert and novice contexts that stand for knowing and not knowing it."""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml


# Ten templates a side, after the released prompts: the expert writes from knowledge, the novice from ignorance.
EXPERT_TEMPLATES = (
    "The following text is written by a leading expert on {keywords}, with every fact correct:",
    "You are the world's foremost authority on {keywords}. Your answer is precise and complete:",
    "An excerpt from an authoritative textbook on {keywords}:",
    "Here is how a professor of {name} with decades of experience explains it in detail:",
    "A specialist in {keywords} wrote down everything there is to know:",
    "From the lecture notes of a renowned scholar of {name}, full of accurate detail:",
    "Expert answer, verified by several authorities on {keywords}:",
    "This passage comes from a reference work about {name} and states the facts exactly:",
    "Someone with a perfect memory of {keywords} says:",
    "An expert on {keywords} never gets a fact wrong. The expert writes:",
)
NOVICE_TEMPLATES = (
    "The following text is written by a novice who knows nothing about {keywords}:",
    "You have never heard of {keywords}. You do not know the facts and write about other things:",
    "An excerpt from a text by somebody who has no knowledge of {keywords}:",
    "Here is how a small child who was never taught {name} would put it:",
    "A person who gets everything about {keywords} wrong wrote this down:",
    "From the notes of a beginner who knows no fact about {name}:",
    "Answer by a layman who cannot remember anything about {keywords}:",
    "This passage comes from a writer to whom {name} is entirely unknown:",
    "Someone who has forgotten everything about {keywords} says:",
    "A novice on {keywords} never gets a fact right. The novice writes:",
)
_FIELDS = ("name", "keywords", "expert_contexts", "novice_contexts")


@dataclass(frozen=True)
class Concept:
    """What is erased.

    Args:
        name (`str`):
            Name of the concept, e.g. `"capitals"`.
        keywords (`tuple[str, ...]`):
            Terms that describe it. They are put into the context templates.
        expert_contexts (`tuple[str, ...]`, *optional*):
            Contexts that make the reference write as an expert; may hold `{name}` and `{keywords}`. Defaults to ten
            templates.
        novice_contexts (`tuple[str, ...]`, *optional*):
            The same for a novice.

    Raises:
        ValueError: if the name, the keywords or a list of contexts is empty, or a template names another field.
    """

    name: str
    keywords: tuple[str, ...]
    expert_contexts: tuple[str, ...] = field(default=EXPERT_TEMPLATES)
    novice_contexts: tuple[str, ...] = field(default=NOVICE_TEMPLATES)

    def __post_init__(self):
        for name in _FIELDS:
            value = getattr(self, name)
            if not value or (name != "name" and isinstance(value, str)):
                raise ValueError(f"Concept field `{name}` is {value!r}: give a non-empty {_expected(name)}.")
        for name in ("expert_contexts", "novice_contexts"):
            try:
                filled = tuple(
                    template.format(name=self.name, keywords=", ".join(self.keywords))
                    for template in getattr(self, name)
                )
            except (KeyError, IndexError) as error:
                raise ValueError(
                    f"Concept field `{name}` uses the placeholder {error}: only {{name}} and {{keywords}} exist."
                ) from error
            object.__setattr__(self, name, filled)


def concept_presets() -> list[str]:
    """Names of the concepts that ship with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in (files(__package__) / "concepts").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_concept(name_or_path: str) -> Concept:
    """Load a concept preset by name, or a concept from a YAML file.

    Args:
        name_or_path (`str`): A name of [`concept_presets`], or the path of a YAML file with `name`, `keywords` and,
            optionally, `expert_contexts` and `novice_contexts`.

    Raises:
        ValueError: for an unknown preset (the message lists them), malformed YAML, an unknown or a missing field.
        OSError: if the file cannot be read.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in concept_presets():
            raise ValueError(
                f"`concept` is {name_or_path!r}, which is no preset; use one of {', '.join(concept_presets())}, or the "
                "path of a .yaml file."
            )
        text = (files(__package__) / "concepts" / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise OSError(f"`concept` is {name_or_path!r}, which cannot be read ({error}): check the path.") from error
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`concept` file {name_or_path} is no valid YAML ({error}): correct it.") from error
    if not isinstance(record, dict):
        raise ValueError(f"`concept` file {name_or_path} holds {type(record).__name__}: give the fields {_FIELDS}.")
    if unknown := set(record) - set(_FIELDS):
        raise ValueError(f"`concept` file {name_or_path} has unknown fields {sorted(unknown)}: use only {_FIELDS}.")
    if missing := {"name", "keywords"} - set(record):
        raise ValueError(f"`concept` file {name_or_path} lacks the fields {sorted(missing)}: add them.")
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}
    return Concept(**fields)


def _expected(name: str) -> str:
    return "string" if name == "name" else "list of strings"
