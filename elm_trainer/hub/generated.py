"""The part of a card that is generated, beside what a person wrote."""

import json
import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import RepoCard

from .untrusted_yaml import read_metadata


CardT = TypeVar("CardT", bound=RepoCard)
START = "<!-- elm-trainer: generated, do not edit -->"
END = "<!-- elm-trainer: end -->"
TAG = "elm-trainer"
CONCEPT_TAG = "concept:"
# `type` of the data sets of generated results, by which they are told from results that a person added.
RESULTS = "elm-trainer"

_START = re.compile(rf"^{re.escape(START)}[ \t]*$", re.MULTILINE)
_END = re.compile(rf"^{re.escape(END)}[ \t]*$", re.MULTILINE)
_RECORD = re.compile(r"^<!-- elm-trainer: metadata (\{.*\}) -->$", re.MULTILINE)
_LISTS = ("tags", "datasets")
# PEFT may write the path of the base model into such a tag; the Hub makes it itself.
_TAG_OF_THE_HUB = "base_model:"


def record(data: dict[str, Any]) -> str:
    """The entries of the metadata's lists as a comment, so that they can be told from a person's own."""
    lists = {key: data[key] for key in _LISTS if data.get(key)}
    # Nothing in it may end the comment.
    text = json.dumps(lists, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<!-- elm-trainer: metadata {text} -->"


def keep_written(card: CardT, current: str | None, replaced: Collection[str]) -> CardT:
    """The generated card with what a person wrote around it.

    Kept are the text outside the generated part, metadata under other keys, tags and data sets that were not generated,
    and results on other data sets. A card without a generated part is kept whole below it, unless it is an
    untouched template of PEFT or TRL. Line endings become `\\n`, and comments in the metadata are lost.

    Args:
        card (`RepoCard`): Card that was just generated.
        current (`str` or `None`): `README.md` as it is now.
        replaced (`Collection[str]`): Keys of the metadata that are generated, whatever stands there now.

    Raises:
        ValueError: if `current` cannot be read, or has one of the two markers without the other or twice.
    """
    if current is None or not current.strip():
        return card
    current = re.sub(r"\r\n?", "\n", current.removeprefix("\ufeff"))
    try:
        read_metadata(current)  # whoever may write to the repository may have written them
        written = type(card)(current)
        before, old, after = _parts(written.text)
        ours = _recorded(old)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"The current README.md cannot be read ({' '.join(str(error).split())}): correct it, or delete it, then "
            "publish again."
        ) from error

    _, generated, _ = _parts(card.text)
    if old:
        card.text = before + generated + after
    elif is_template(written.text):
        card.text = f"\n{generated}\n"
    else:
        card.text = f"\n{generated}\n" + (f"\n{text}\n" if (text := written.text.strip()) else "")

    for key, value in written.data.to_dict().items():
        if key in _LISTS:
            entries = [str(entry) for entry in (value if isinstance(value, list) else [value])]
            theirs = [e for e in entries if e not in ours.get(key, ()) and not e.startswith(_TAG_OF_THE_HUB)]
            merged = list(dict.fromkeys([*(card.data.get(key) or ()), *theirs]))
            card.data[key] = merged or None
        elif key == "model-index" and isinstance(card.data, ModelCardData) and isinstance(written.data, ModelCardData):
            results = [result for result in written.data.eval_results or () if result.dataset_type != RESULTS]
            card.data.eval_results = [*(card.data.eval_results or ()), *results]
        elif key not in replaced:
            card.data[key] = value
    return type(card)(str(card))


def is_template(text: str) -> bool:
    """Whether every line of a card's text is one that the templates of PEFT or TRL write."""
    lines = {line.strip() for line in re.sub(r"```bibtex\n.*?```", "", text, flags=re.DOTALL).splitlines()} - {""}
    if not lines:
        return False
    known = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    known |= {"### Framework versions"}
    patterns = [re.compile(r"- PEFT:? \S+"), *_trl_lines()]
    return all(line in known or any(pattern.fullmatch(line) for pattern in patterns) for line in lines)


def _trl_lines() -> list[re.Pattern[str]]:
    """What each line of TRL's card templates can be filled in to."""
    spec = find_spec("trl")
    folder = Path(spec.origin).parent / "templates" if spec and spec.origin else Path()
    lines = {line.strip() for path in folder.glob("*_model_card.md") for line in path.read_text("utf-8").splitlines()}
    # Once without what stands under a condition, once with it.
    lines |= {re.sub(r"\{% if .*?\{% endif %\}", "{{ condition }}", line) for line in lines}
    filled = [re.split(r"\{\{.*?\}\}|\{%.*?%\}", line) for line in lines]
    # A line that is one variable could be anything.
    return [re.compile(".*".join(map(re.escape, parts))) for parts in filled if "".join(parts).strip()]


def _recorded(old: str) -> dict[str, list[str]]:
    """The lists that [`record`] wrote into the generated part."""
    found = _RECORD.search(old)
    lists = json.loads(found[1]) if found else {}
    return {key: list(lists[key]) for key in _LISTS if key in lists}


def _parts(text: str) -> tuple[str, str, str]:
    """Text before the generated part, that part with its markers, and text after it."""
    starts, ends = list(_START.finditer(text)), list(_END.finditer(text))
    if not starts and not ends:
        return text, "", ""
    if len(starts) != 1 or len(ends) != 1 or starts[0].end() > ends[0].start():
        raise ValueError(
            f"the line {START!r} stands there {len(starts)} times and the line {END!r} {len(ends)} times, but each must "
            "stand there once and in this order, or not at all"
        )
    start, end = starts[0].start(), ends[0].end()
    return text[:start], text[start:end], text[end:]
