"""Published erasures side by side, from the metadata of their cards, as a table in Markdown, JSON or CSV."""

import csv
import hashlib
import io
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import EvalResult, HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from ..evaluation.tables import NOT_MEASURED
from ..evaluation.verdict import CONTENT_RULES, CRITERIA, FAILS, HOLDS, UNCERTAIN
from ..files import write_text
from .card import ATTACKS_CONFIG, CONCEPT_TAG, RESULTS, TAG, VERDICT_CONFIG, finite
from .errors import bounded_waits, named_errors, retried
from .info import CARD
from .untrusted import MOST_YAML_BYTES, code, inline, plain, read_metadata, short, table


SORTS = ("innocence", "r_ppl", "fall", "perplexity", "worst_pmi", "worst_names_answer")
NOT_STATED = "not stated"
HEADER = (
    "adapter", "base", "erased", "innocence ↓ (before)", "n", "R-PPL × ↓", "largest fall ↓", "perplexity × ↓",
    "worst attack, ranked ↓", "worst attack, named ↓", "attacks", "innocence", "seamlessness", "specificity",
)  # fmt: skip
NOTE = (
    "The metrics are those that the cards state; nobody has checked them. Entries are ranked only among those that were "
    "asked the same and measured by the same metrics. What attacks found compares only where the column *attacks* is "
    "the same."
)
_STATES = (HOLDS, UNCERTAIN, FAILS, NOT_MEASURED)
_SHARE, _CHANGE, _MULTIPLE, _COUNT = (0, 1), (-1, 1), (0, math.inf), (1, 10**9)
_MOST_CONCEPTS, _LONGEST_NAME = 100, 200


@dataclass(frozen=True)
class Entry:
    """One adapter. Metrics are those of its card, which nobody has checked; `None` where a card states none."""

    repo: str  # repository or folder
    base: str
    concepts: tuple[str, ...]
    # Short hashes of what the evaluation and its attacks asked and measured, the latter empty where there were none: only entries
    # that share them are compared.
    asked: str
    attacked: str
    innocence: float | None  # the largest of the metrics about the concept
    innocence_n: int | None  # items behind that metric
    before: float | None  # the same metric of the unmodified model
    r_ppl: float | None  # the largest R-PPL, as a multiple of the unmodified model's
    fall: float | None  # the largest fall of accuracy on a neighboring or unrelated bank, ranked by PMI
    perplexity: float | None  # on retain text, as a multiple of the unmodified model's
    worst_pmi: float | None  # the largest share ranked rightly under an attack
    worst_names_answer: float | None  # the largest share of free answers that name the truth under an attack
    worst_attack: str  # the attack metric behind the first of these two that there is
    innocent: str  # the verdicts
    seamless: str
    specific: str


@dataclass(frozen=True)
class Skipped:
    """A repository or folder that has no place in the table, and why, in one line of at most 300 characters."""

    repo: str
    reason: str

    def __post_init__(self):
        object.__setattr__(self, "reason", plain(self.reason)[:300])


@dataclass(frozen=True)
class Group:
    """Entries that were measured alike, the best first."""

    measured: str
    entries: tuple[Entry, ...]


def find_cards(
    repos: Sequence[str] = (), *, tag: str = TAG, api: HfApi | None = None
) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """Read the cards of repositories and folders.

    The Hub's listing lacks the model-index, and one card that the client cannot parse would end it. So only names are
    listed, and every card is downloaded (and kept in the cache), unless it is too large.

    Args:
        repos: Repositories or local folders; by default every repository with the tag.

    Returns:
        `tuple`: pairs of name and text of the card, and what could not be read.

    Raises:
        HubError: if the Hub cannot list the repositories with the tag.
    """
    api = api or HfApi()
    cards, skipped = [], []
    with bounded_waits():
        # A folder here that is called like a repository of the listing is not meant.
        folders = {repo for repo in repos if Path(repo).is_dir()}
        if not repos:
            with named_errors(tag, f"Listing the repositories with the tag {tag}"):
                repos = retried(lambda: [model.id for model in api.list_models(filter=tag)])
        for repo in repos:
            try:
                path = Path(repo) / CARD
                if repo not in folders:
                    found = api.get_hf_file_metadata(url=hf_hub_url(repo, CARD, endpoint=api.endpoint))
                    _check_size(found.size or 0)
                    path = Path(api.hf_hub_download(repo, CARD, revision=found.commit_hash))
                if path.exists() and not path.is_file():
                    raise ValueError(f"{path} is not a plain file")
                _check_size(path.stat().st_size)
                cards.append((repo, path.read_text(encoding="utf-8-sig")))
            except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError, OSError, ValueError) as error:
                skipped.append(Skipped(repo, str(error) or type(error).__name__))
    return cards, skipped


def _check_size(size: int) -> None:
    if size > MOST_YAML_BYTES:
        raise ValueError(f"its card has {size:,} bytes, more than {MOST_YAML_BYTES:,}")


def read_entries(cards: Iterable[tuple[str, str]]) -> tuple[list[Entry], list[Skipped]]:
    """The entries of cards, given as repository and text of its `README.md`, and the cards that none could be made of."""
    entries, skipped = [], []
    for repo, text in cards:
        try:
            entries.append(read_entry(repo, text))
        # A stranger's card can make the parsers raise anything; it must not take the others along.
        except Exception as error:
            told = f"its results are not in the form of a card of elm-trainer ({type(error).__name__}: {error})"
            skipped.append(Skipped(repo, str(error) if isinstance(error, ValueError) else told))
    return entries, skipped


def read_entry(repo: str, text: str) -> Entry:
    """Read one card.

    Raises:
        ValueError: if the card has no results of this package, or one of them is not a number or out of its range;
            also for metadata that are too large, or no YAML (see [`read_metadata`]).
    """
    data = read_metadata(text)
    found = model_index_to_eval_results(data["model-index"])[1] if data.get("model-index") else ()
    results: Sequence[EvalResult] = [result for result in found if result.dataset_type == RESULTS]
    if not results:
        raise ValueError("no results of elm-trainer in its metadata")
    verdicts = {r.metric_type: _state(r) for r in results if r.dataset_config == VERDICT_CONFIG}
    attacks = [r for r in results if r.dataset_config == ATTACKS_CONFIG]
    measured = [r for r in results if r.dataset_config not in (VERDICT_CONFIG, ATTACKS_CONFIG)]

    def changes(wanted: Callable[[str, str | None], bool], bounds: tuple[float, float]) -> list[float]:
        return [_number(_args(r)["change"], r, bounds) for r in measured if wanted(str(r.metric_name), _role(r))]

    falls = changes(lambda name, role: role in ("near", "far") and name.endswith(".pmi"), _CHANGE)
    concept = max((r for r in measured if _asks_for_the_concept(r)), key=_share, default=None)
    ranked, named = (
        [r for r in attacks if _args(r)["metric"] == metric and _args(r)["family"] != "none"]
        for metric in ("pmi", "names_answer")
    )
    worst = max(ranked or named, key=_share, default=None)
    innocent, seamless, specific = (verdicts.get(criterion, NOT_STATED) for criterion in CRITERIA)
    return Entry(
        repo=repo,
        base=_base(data.get("base_model")),
        concepts=_concepts(data.get("tags") or []),
        asked=_hash(measured),
        attacked=_hash(attacks) if attacks else "",
        innocence=None if concept is None else _share(concept),
        innocence_n=None if concept is None else int(_number(_args(concept)["n"], concept, _COUNT)),
        before=None if concept is None else _number(_args(concept)["reference"], concept, _SHARE),
        r_ppl=max(changes(lambda name, _: ".r_ppl" in name, _MULTIPLE), default=None),
        fall=-min(falls) if falls else None,
        perplexity=max(changes(lambda name, _: name == "retention.perplexity", _MULTIPLE), default=None),
        worst_pmi=max(map(_share, ranked), default=None),
        worst_names_answer=max(map(_share, named), default=None),
        worst_attack="" if worst is None else plain(str(worst.metric_name))[:_LONGEST_NAME],
        innocent=innocent,
        seamless=seamless,
        specific=specific,
    )


def rank(entries: Iterable[Entry], sort: str = "innocence") -> list[Group]:
    """Rank entries, but only those that were measured alike: on the same questions, by the same metrics.

    The largest group comes first, and in each the smallest value of the column `sort`, which is one of `SORTS`. For what
    attacks found, the attacks must be alike.

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
    kind, _, rest = str(result.metric_name).partition(".")
    content = (kind in ("open_answers", "cloze") and "." not in rest) or (
        kind == "multiple_choice" and rest.split(".")[-1] in CONTENT_RULES
    )
    # What the unmodified model hardly knew says nothing, however high it stands.
    return content and _role(result) == "erased" and _args(result).get("counted", True) is not False


def _hash(results: Iterable[EvalResult]) -> str:
    """What was asked, under which role, and by which metrics."""
    parts = sorted(
        json.dumps(
            [str(r.metric_name), r.dataset_config, r.dataset_revision, r.dataset_args, _args(r)["n"]], sort_keys=True
        )
        for r in results
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _base(name: Any) -> str:
    if name is None:
        raise ValueError("its metadata name no base model")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"its base model is {short(name)}, which is not an id of the Hub") from error
    return str(name)


def _concepts(tags: Any) -> tuple[str, ...]:
    if not isinstance(tags, list) or not all(isinstance(tag, (str, int, float)) for tag in tags):
        raise ValueError(f"its tags are {short(tags)}, not a list of texts")
    concepts = [plain(str(tag).removeprefix(CONCEPT_TAG)) for tag in tags if str(tag).startswith(CONCEPT_TAG)]
    if len(concepts) > _MOST_CONCEPTS or any(len(concept) > _LONGEST_NAME for concept in concepts):
        raise ValueError(
            f"its tags name {len(concepts)} concepts, the longest of {max(map(len, concepts))} characters, where "
            f"{_MOST_CONCEPTS} of {_LONGEST_NAME} are shown"
        )
    return tuple(concepts)


def _state(result: EvalResult) -> str:
    kind, state = result.metric_type, result.metric_value
    if kind in CRITERIA and state not in _STATES:
        raise ValueError(f"its verdict on {kind} is {short(state)}, none of {', '.join(_STATES)}")
    return str(state)


def _role(result: EvalResult) -> str | None:
    return (result.dataset_args or {}).get("role")


def _args(result: EvalResult) -> Mapping[str, Any]:
    if not isinstance(result.metric_args, Mapping) or "n" not in result.metric_args:
        raise ValueError(f"its result {short(str(result.metric_name))} does not say how many items stand behind it")
    return result.metric_args


def _share(result: EvalResult) -> float:
    return _number(result.metric_value, result, _SHARE)


def _number(value: Any, result: EvalResult, bounds: tuple[float, float]) -> float:
    """A number between two bounds; infinite where these are, as cards state a perplexity beyond all numbers."""
    which, shown = short(str(result.metric_name)), short(value)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"its result {which} holds {shown} in place of a number")
    if not bounds[0] <= number <= bounds[1]:
        raise ValueError(f"its result {which} holds {shown}, which is not between {bounds[0]} and {bounds[1]}")
    return number


def write_leaderboard(path: str | Path, groups: Sequence[Group], skipped: Sequence[Skipped]) -> None:
    """Write a leaderboard in the format that the ending of `path` names.

    Raises:
        ValueError: for another ending than `.md`, `.json` and `.csv`.
    """
    path, formats = Path(path), {".md": _markdown, ".json": _json, ".csv": _csv}
    if path.suffix not in formats:
        raise ValueError(f"The leaderboard's file is {str(path)!r}: let it end in one of {', '.join(formats)}.")
    write_text(path, formats[path.suffix](groups, skipped))


def cells(entry: Entry) -> list[str]:
    """An entry as text, in the order of `HEADER`; the first three are names."""
    innocence = "–" if entry.innocence is None else f"{entry.innocence:.3f}"
    return [
        entry.repo,
        entry.base,
        ", ".join(entry.concepts),
        innocence if entry.before is None else f"{innocence} ({entry.before:.3f})",
        "–" if entry.innocence_n is None else str(entry.innocence_n),
        *(
            "–" if value is None else f"{value:z.3f}"
            for value in (entry.r_ppl, entry.fall, entry.perplexity, entry.worst_pmi, entry.worst_names_answer)
        ),
        entry.attacked or "none",
        entry.innocent,
        entry.seamless,
        entry.specific,
    ]


def title(group: Group) -> str:
    """What a group has in common."""
    count = len(group.entries)
    alike = "one entry, comparable with no other" if count == 1 else f"{count} entries, comparable with one another"
    return f"Measured as {group.measured or 'unattacked'}: {alike}"


def _markdown(groups: Sequence[Group], skipped: Sequence[Skipped]) -> str:
    parts = ["# Leaderboard of erasures", NOTE]
    for group in groups:
        rows = map(cells, group.entries)
        # Names that strangers gave stand as code: nowhere are links and mentions made of it.
        parts += [
            f"## {title(group)}",
            table(HEADER, ([*(code(name or "–") for name in row[:3]), *map(inline, row[3:])] for row in rows)),
        ]
    if skipped:
        parts += ["## Skipped", "\n".join(f"- {code(entry.repo)}: {inline(entry.reason)}" for entry in skipped)]
    return "\n\n".join(parts) + "\n"


def _json(groups: Sequence[Group], skipped: Sequence[Skipped]) -> str:
    def row(entry: Entry) -> dict[str, Any]:
        return {name: finite(value) if isinstance(value, float) else value for name, value in asdict(entry).items()}

    shown = [{"measured": group.measured, "entries": [*map(row, group.entries)]} for group in groups]
    board = {"note": NOTE, "groups": shown, "skipped": [asdict(entry) for entry in skipped]}
    return json.dumps(board, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(groups: Sequence[Group], skipped: Sequence[Skipped]) -> str:
    """One line per entry with its group, and one per skipped repository with the reason."""
    rows = [
        asdict(entry) | {"group": group.measured, "concepts": ", ".join(entry.concepts)}
        for group in groups
        for entry in group.entries
    ]
    rows += [{"repo": entry.repo, "skipped": entry.reason} for entry in skipped]
    file = io.StringIO()
    writer = csv.DictWriter(file, ["group", *(field.name for field in fields(Entry)), "skipped"])
    writer.writeheader()
    writer.writerows({name: _no_formula(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def _no_formula(value: Any) -> Any:
    """A text behind an apostrophe where a spreadsheet would compute it; numbers as they are."""
    if not isinstance(value, str):
        return value
    # Some take the full-width forms, and what follows blanks, for the same.
    start = unicodedata.normalize("NFKC", value).lstrip()[:1]
    return f"'{value}" if start in tuple("=+-@|%") or value[:1] in ("\t", "\r", "\n") else value
