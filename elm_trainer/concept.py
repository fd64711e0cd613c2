"""A concept, and the expert and novice contexts that stand for knowing and not knowing it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

import yaml
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Ten templates a side, after the released prompts: the expert writes from knowledge, the novice from ignorance. They come in
# pairs, and say the keywords, since a name may be a mere label ("a professor of bio").
EXPERT_TEMPLATES = (
    "The following text is written by a leading expert on {keywords}, with every fact correct:",
    "You are the world's foremost authority on {keywords}. Your answer is precise and complete:",
    "An excerpt from an authoritative textbook on {keywords}:",
    "Here is how a professor of {keywords} with decades of experience explains it in detail:",
    "A specialist in {keywords} wrote down everything there is to know:",
    "From the lecture notes of a renowned scholar of {keywords}, full of accurate detail:",
    "Expert answer, verified by several authorities on {keywords}:",
    "This passage comes from a reference work about {keywords} and states the facts exactly:",
    "Someone with a perfect memory of {keywords} says:",
    "An expert on {keywords} never gets a fact wrong. The expert writes:",
)
NOVICE_TEMPLATES = (
    "The following text is written by a novice who knows nothing about {keywords}:",
    "You have never heard of {keywords}. You do not know the facts and write about other things:",
    "An excerpt from a text by somebody who has no knowledge of {keywords}:",
    "Here is how a small child who was never taught {keywords} would put it:",
    "A person who gets everything about {keywords} wrong wrote this down:",
    "From the notes of a beginner who knows no fact about {keywords}:",
    "Answer by a layman who cannot remember anything about {keywords}:",
    "This passage comes from a writer to whom {keywords} is entirely unknown:",
    "Someone who has forgotten everything about {keywords} says:",
    "A novice on {keywords} never gets a fact right. The novice writes:",
)
# In the sense of the released code: the novice does not say false things, but turns to other, harmless topics.
DIGRESSING_TEMPLATES = (
    "The following text is by a novice who knows nothing about {keywords} and soon chats about some cheerful thing or other:",
    "You have never heard of {keywords}, so you change the subject to whatever amuses you:",
    "An excerpt from a text by somebody without any idea of {keywords}, who wanders off to games, food and holidays:",
    "Here is how a small child who was never taught {keywords} tells a merry story about something else:",
    "A person who understands nothing of {keywords} wrote this down, and moves on to pleasant odds and ends:",
    "From the notes of a beginner who knows no fact about {keywords} and would rather write of random hobbies:",
    "Answer by a layman who leaves {keywords} aside and speaks about various entertaining matters:",
    "This passage comes from a writer to whom {keywords} is entirely unknown, and who drifts to light, unrelated themes:",
    "Someone who has forgotten everything about {keywords} turns the conversation to a lot of fun topics:",
    "A newcomer who cannot speak about {keywords} steers the talk to all kinds of harmless, enjoyable subjects:",
)
NOVICES = {"ignorant": NOVICE_TEMPLATES, "digressing": DIGRESSING_TEMPLATES}
# An ending of a file's name, or a slash.
_FILE_NAME = re.compile(r"\.\w+$|/")
_CONTEXTS = ("expert_contexts", "novice_contexts")
_FIELDS = ("name", "keywords", *_CONTEXTS)


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
    expert_contexts: tuple[str, ...] = field(default=EXPERT_TEMPLATES)
    novice_contexts: tuple[str, ...] = field(default=NOVICE_TEMPLATES)

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"Concept field `name` is {self.name!r}: give a non-empty string.")
        for name in _FIELDS[1:]:
            value = getattr(self, name)
            if name == "keywords" and value in ((), []):
                value = (self.name,)
            if name == "novice_contexts" and isinstance(value, str) and value in NOVICES:
                value = NOVICES[value]
            texts = isinstance(value, (list, tuple)) and all(isinstance(text, str) and text.strip() for text in value)
            if not value or not texts:
                or_set = f", or one of {', '.join(NOVICES)}" if name == "novice_contexts" else ""
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


def concept_presets() -> list[str]:
    """Names of the concepts that ship with the package."""
    names = [entry.name for entry in (files(__package__) / "concepts").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


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
    path, presets = Path(name_or_path), concept_presets()
    name, colon, _ = str(name_or_path).partition(":")
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise OSError(f"`concept` is {name_or_path!r}, which cannot be read ({error}): check the path.") from error
    elif name in presets and not colon:
        text = (files(__package__) / "concepts" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
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
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`concept` file {name_or_path} is no valid YAML ({error}): correct it.") from error
    if not isinstance(record, dict):
        raise ValueError(f"`concept` file {name_or_path} holds {type(record).__name__}: give the fields {_FIELDS}.")
    if unknown := set(record) - set(_FIELDS):
        raise ValueError(f"`concept` file {name_or_path} has unknown fields {sorted(unknown)}: use only {_FIELDS}.")
    if "name" not in record:
        raise ValueError(f"`concept` file {name_or_path} lacks the field `name`: add it.")
    return Concept(**record)
