"""Many published erasures side by side, from the metadata of their cards."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..evaluation.verdict import CONTENT_RULES
from .generated import CONCEPT_TAG, RESULTS
from .results import ATTACKS_CONFIG, VERDICT_CONFIG


SORTS = ("innocence", "r_ppl", "fall", "perplexity", "worst_pmi", "worst_names_answer")
NOT_STATED = "not stated"
_KEPT = ("near", "far")


@dataclass(frozen=True)
class Entry:
    """One adapter. Figures are those of its card, which nobody has checked; `None` where a card states none.

    Args:
        repo (`str`): Repository or folder.
        base (`str`): Base model.
        concepts (`tuple[str, ...]`): What it erases.
        asked (`str`): Short hash of what the evaluation asked and measured: only entries that share it are compared.
        attacked (`str`): The same of its attacks; empty where there were none.
        innocence (`float`, *optional*): Largest of the figures about the concept.
        innocence_n (`int`, *optional*): Items behind that figure.
        before (`float`, *optional*): The same figure of the unmodified model.
        r_ppl (`float`, *optional*): Largest R-PPL, as a multiple of the unmodified model's.
        fall (`float`, *optional*): Largest fall of accuracy on a neighbouring or unrelated bank, ranked by PMI.
        perplexity (`float`, *optional*): Perplexity on retain text, as a multiple of the unmodified model's.
        worst_pmi (`float`, *optional*): Largest share ranked rightly under an attack.
        worst_names_answer (`float`, *optional*): Largest share of free answers that name the truth under an attack.
        worst_attack (`str`): Name of the attack figure behind the first of these two that there is.
        innocent, seamless, specific (`str`): The verdicts.
    """

    repo: str
    base: str
    concepts: tuple[str, ...]
    asked: str
    attacked: str
    innocence: float | None
    innocence_n: int | None
    before: float | None
    r_ppl: float | None
    fall: float | None
    perplexity: float | None
    worst_pmi: float | None
    worst_names_answer: float | None
    worst_attack: str
    innocent: str
    seamless: str
    specific: str


@dataclass(frozen=True)
class Skipped:
    """A repository or folder that has no place in the table, and why."""

    repo: str
    reason: str


@dataclass(frozen=True)
class Group:
    """Entries that were measured alike, the best first."""

    measured: str
    entries: tuple[Entry, ...]


def read_entries(cards: Iterable[tuple[str, str]]) -> tuple[list[Entry], list[Skipped]]:
    """Read the metadata of cards.

    Args:
        cards (`Iterable[tuple[str, str]]`): Name of a repository and text of its `README.md`.

    Returns:
        `tuple`: the entries, and the cards that none could be made of.
    """
    entries, skipped = [], []
    for repo, text in cards:
        try:
            entries.append(read_entry(repo, text))
        # A stranger's card can make the parsers raise anything; it must not take the others along.
        except Exception as error:
            skipped.append(Skipped(repo, " ".join(f"{error}".split()) or type(error).__name__))
    return entries, skipped


def read_entry(repo: str, text: str) -> Entry:
    """Read one card.

    Raises:
        ValueError: if the card has no results of this package, or one of them is no number.
    """
    data = ModelCard(text).data
    results: Sequence[EvalResult] = [r for r in data.get("eval_results") or () if r.dataset_type == RESULTS]
    if not results:
        raise ValueError("no results of elm-trainer in its metadata")
    verdicts = {r.metric_type: str(r.metric_value) for r in results if r.dataset_config == VERDICT_CONFIG}
    attacks = [r for r in results if r.dataset_config == ATTACKS_CONFIG]
    figures = [r for r in results if r.dataset_config not in (VERDICT_CONFIG, ATTACKS_CONFIG)]
    # What a neighbour of the concept lost, as a positive number.
    falls = [-_number(_args(r)["change"], r) for r in figures if _role(r) in _KEPT and _name(r).endswith(".pmi")]
    r_ppls = [_number(_args(r)["change"], r) for r in figures if ".r_ppl" in _name(r)]
    perplexities = [_number(_args(r)["change"], r) for r in figures if _name(r) == "retention.perplexity"]
    tags = [str(tag) for tag in data.get("tags") or ()]
    concept = max((r for r in figures if _asks_for_the_concept(r)), key=_value, default=None)
    tried = {
        metric: max(found, key=_value)
        for metric in ("pmi", "names_answer")
        if (found := [r for r in attacks if _args(r)["metric"] == metric and _args(r)["family"] != "none"])
    }
    return Entry(
        repo=repo,
        base=str(data.get("base_model", "")),
        concepts=tuple(tag.removeprefix(CONCEPT_TAG) for tag in tags if tag.startswith(CONCEPT_TAG)),
        asked=_hash(figures),
        attacked=_hash(attacks) if attacks else "",
        innocence=None if concept is None else _value(concept),
        innocence_n=None if concept is None else int(_args(concept)["n"]),
        before=None if concept is None else _number(_args(concept)["reference"], concept),
        r_ppl=max(r_ppls, default=None),
        fall=max(falls, default=None),
        perplexity=max(perplexities, default=None),
        worst_pmi=_value(tried["pmi"]) if "pmi" in tried else None,
        worst_names_answer=_value(tried["names_answer"]) if "names_answer" in tried else None,
        worst_attack=next((_name(found) for found in tried.values()), ""),
        innocent=verdicts.get("innocence", NOT_STATED),
        seamless=verdicts.get("seamlessness", NOT_STATED),
        specific=verdicts.get("specificity", NOT_STATED),
    )


def rank(entries: Iterable[Entry], sort: str = "innocence") -> list[Group]:
    """Rank entries, but only those that were measured alike: on the same questions, by the same figures.

    Args:
        entries (`Iterable[Entry]`): Entries.
        sort (`str`, *optional*, defaults to `"innocence"`): Column in `SORTS`; the smallest value is the best. For what
            attacks found, the attacks must be alike.

    Returns:
        `list[Group]`: the largest group first.

    Raises:
        ValueError: for an unknown column.
    """
    if sort not in SORTS:
        raise ValueError(f"`sort` is {sort!r}: use one of {', '.join(SORTS)}.")
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.attacked if sort.startswith("worst") else entry.asked, []).append(entry)

    def place(entry: Entry) -> tuple[bool, float, str]:
        value = getattr(entry, sort)
        missing = value is None or math.isnan(value)
        return missing, 0.0 if missing else value, entry.repo

    ranked = [Group(key, tuple(sorted(found, key=place))) for key, found in groups.items()]
    return sorted(ranked, key=lambda group: (-len(group.entries), group.measured))


def _asks_for_the_concept(result: EvalResult) -> bool:
    kind, _, rest = _name(result).partition(".")
    content = (kind in ("open_answers", "cloze") and "." not in rest) or (
        kind == "multiple_choice" and rest.split(".")[-1] in CONTENT_RULES
    )
    # What the unmodified model hardly knew says nothing, however high it stands.
    return content and _role(result) == "erased" and _args(result).get("counted", True) is not False


def _hash(results: Iterable[EvalResult]) -> str:
    """What was asked, under which role, and by which figures."""
    parts = sorted(
        json.dumps([_name(r), r.dataset_config, r.dataset_revision, r.dataset_args, _args(r)["n"]], sort_keys=True)
        for r in results
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _name(result: EvalResult) -> str:
    return str(result.metric_name)


def _role(result: EvalResult) -> str | None:
    return (result.dataset_args or {}).get("role")


def _args(result: EvalResult) -> Mapping[str, Any]:
    if not isinstance(result.metric_args, Mapping) or "n" not in result.metric_args:
        raise ValueError(f"its result {_name(result)!r} does not say how many items stand behind it")
    return result.metric_args


def _value(result: EvalResult) -> float:
    return _number(result.metric_value, result)


def _number(value: Any, result: EvalResult) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its result {_name(result)!r} holds {value!r} in place of a number") from error
