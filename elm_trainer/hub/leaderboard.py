"""Published erasures side by side, from the metadata of their cards on the Hub or in local folders."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import EvalResult, HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from ..evaluation.tables import NOT_MEASURED
from ..evaluation.verdict import CONTENT_RULES, CRITERIA, FAILS, HOLDS, UNCERTAIN
from .card_data import ATTACKS_CONFIG, CONCEPT_TAG, RESULTS, TAG, VERDICT_CONFIG
from .errors import named_errors, patience, retried
from .info import CARD
from .untrusted import MOST_YAML_BYTES as MOST_BYTES
from .untrusted import plain, read_metadata


SORTS = ("innocence", "r_ppl", "fall", "perplexity", "worst_pmi", "worst_names_answer")
NOT_STATED = "not stated"
_KEPT = ("near", "far")
_STATES = (HOLDS, UNCERTAIN, FAILS, NOT_MEASURED)
_SHARE, _CHANGE, _MULTIPLE, _COUNT = (0, 1), (-1, 1), (0, math.inf), (1, 10**9)
_MOST_CONCEPTS = 100
_LONGEST_NAME = 200


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
    """A repository or folder that has no place in the table, and why (in one line, however long the card's own words)."""

    repo: str
    reason: str

    def __post_init__(self):
        object.__setattr__(self, "reason", _short(plain(self.reason), 300))


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
        except ValueError as error:
            skipped.append(Skipped(repo, str(error)))
        # A stranger's card can make the parsers raise anything; it must not take the others along.
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            skipped.append(Skipped(repo, f"its results are not in the form of a card of elm-trainer ({told})"))
    return entries, skipped


def read_entry(repo: str, text: str) -> Entry:
    """Read one card.

    Raises:
        ValueError: if the card has no results of this package, or one of them is no number or none that it can be; also
            for metadata that are too large, or no YAML (see [`read_metadata`]).
    """
    data = read_metadata(text)
    found = model_index_to_eval_results(data["model-index"])[1] if data.get("model-index") else ()
    results: Sequence[EvalResult] = [result for result in found if result.dataset_type == RESULTS]
    if not results:
        raise ValueError("no results of elm-trainer in its metadata")
    verdicts = {r.metric_type: _state(r) for r in results if r.dataset_config == VERDICT_CONFIG}
    attacks = [r for r in results if r.dataset_config == ATTACKS_CONFIG]
    figures = [r for r in results if r.dataset_config not in (VERDICT_CONFIG, ATTACKS_CONFIG)]
    # What a neighbour of the concept lost, as a positive number.
    falls = [
        -_number(_args(r)["change"], r, _CHANGE) for r in figures if _role(r) in _KEPT and _name(r).endswith(".pmi")
    ]
    r_ppls = [_number(_args(r)["change"], r, _MULTIPLE) for r in figures if ".r_ppl" in _name(r)]
    perplexities = [_number(_args(r)["change"], r, _MULTIPLE) for r in figures if _name(r) == "retention.perplexity"]
    concept = max((r for r in figures if _asks_for_the_concept(r)), key=_value, default=None)
    tried = {
        metric: max(found, key=_value)
        for metric in ("pmi", "names_answer")
        if (found := [r for r in attacks if _args(r)["metric"] == metric and _args(r)["family"] != "none"])
    }
    return Entry(
        repo=repo,
        base=_base(data.get("base_model")),
        concepts=_concepts(data.get("tags") or []),
        asked=_hash(figures),
        attacked=_hash(attacks) if attacks else "",
        innocence=None if concept is None else _value(concept),
        innocence_n=None if concept is None else int(_number(_args(concept)["n"], concept, _COUNT)),
        before=None if concept is None else _number(_args(concept)["reference"], concept, _SHARE),
        r_ppl=max(r_ppls, default=None),
        fall=max(falls, default=None),
        perplexity=max(perplexities, default=None),
        worst_pmi=_value(tried["pmi"]) if "pmi" in tried else None,
        worst_names_answer=_value(tried["names_answer"]) if "names_answer" in tried else None,
        worst_attack=next((_short(plain(_name(found)), _LONGEST_NAME) for found in tried.values()), ""),
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
        return value is None, 0.0 if value is None else value, entry.repo

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


def _base(name: Any) -> str:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"its base model is {_short(repr(name))}, which is no id of the Hub") from error
    if name is None:
        raise ValueError("its metadata name no base model")
    return str(name)


def _concepts(tags: Any) -> tuple[str, ...]:
    if not isinstance(tags, list) or not all(isinstance(tag, (str, int, float)) for tag in tags):
        raise ValueError(f"its tags are {_short(repr(tags))}, not a list of texts")
    concepts = [plain(str(tag).removeprefix(CONCEPT_TAG)) for tag in tags if str(tag).startswith(CONCEPT_TAG)]
    if len(concepts) > _MOST_CONCEPTS or any(len(concept) > _LONGEST_NAME for concept in concepts):
        raise ValueError(
            f"its tags name {len(concepts)} concepts, the longest of {max(map(len, concepts))} characters, where "
            f"{_MOST_CONCEPTS} of {_LONGEST_NAME} are shown"
        )
    return tuple(concepts)


def _state(result: EvalResult) -> str:
    if result.metric_type in CRITERIA and result.metric_value not in _STATES:
        raise ValueError(
            f"its verdict on {result.metric_type} is {_short(repr(result.metric_value))}, none of {', '.join(_STATES)}"
        )
    return str(result.metric_value)


def _name(result: EvalResult) -> str:
    return str(result.metric_name)


def _role(result: EvalResult) -> str | None:
    return (result.dataset_args or {}).get("role")


def _args(result: EvalResult) -> Mapping[str, Any]:
    if not isinstance(result.metric_args, Mapping) or "n" not in result.metric_args:
        raise ValueError(f"its result {_short(repr(_name(result)))} does not say how many items stand behind it")
    return result.metric_args


def _value(result: EvalResult) -> float:
    return _number(result.metric_value, result, _SHARE)


def _number(value: Any, result: EvalResult, bounds: tuple[float, float]) -> float:
    """A number between two bounds; infinite where these are, as cards state a perplexity beyond all numbers."""
    which, shown = _short(repr(_name(result))), _short(repr(value))
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"its result {which} holds {shown} in place of a number") from error
    if isinstance(value, bool) or math.isnan(number):
        raise ValueError(f"its result {which} holds {shown} in place of a number")
    if not bounds[0] <= number <= bounds[1]:
        raise ValueError(f"its result {which} holds {shown}, which is not between {bounds[0]} and {bounds[1]}")
    return number


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def find_cards(
    repos: Sequence[str] = (), *, tag: str = TAG, api: HfApi | None = None
) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """Read the cards of repositories and folders.

    The Hub's listing leaves the model-index out of what it says of a repository, and one card that the client cannot parse
    would end it. So only names are listed, and every card is downloaded (and kept in the cache), unless it is too large.

    Args:
        repos (`Sequence[str]`, *optional*): Repositories or local folders. Defaults to every repository with the tag.
        tag (`str`, *optional*, defaults to `"elm-trainer"`): Tag of the repositories.
        api (`HfApi`, *optional*): Client. The default takes endpoint and token from the environment.

    Returns:
        `tuple`: pairs of name and text of the card, and what could not be read.

    Raises:
        HubError: if the Hub cannot list the repositories with the tag.
    """
    api = api or HfApi()
    cards, skipped = [], []
    with patience():
        # A folder here that is called like a repository of the listing is not meant.
        folders = {repo for repo in repos if Path(repo).is_dir()}
        if not repos:
            with named_errors(tag, f"Listing the repositories with the tag {tag}"):
                repos = retried(lambda: [model.id for model in api.list_models(filter=tag)])
        for repo in repos:
            try:
                path = Path(repo) / CARD if repo in folders else _download(repo, api)
                cards.append((repo, _read(path)))
            except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError, OSError, ValueError) as error:
                skipped.append(Skipped(repo, str(error) or type(error).__name__))
    return cards, skipped


def _download(repo: str, api: HfApi) -> Path:
    found = api.get_hf_file_metadata(url=hf_hub_url(repo, CARD, endpoint=api.endpoint))
    _check_size(found.size or 0)
    return Path(api.hf_hub_download(repo, CARD, revision=found.commit_hash))


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no plain file")
    _check_size(path.stat().st_size)
    return path.read_text(encoding="utf-8-sig")


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"its card has {size:,} bytes, more than {MOST_BYTES:,}")
