"""Where texts come from: built-in sources, files, data sets on the Hub, lists and data sets in memory; and the dataset made of them."""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import Any

from datasets import Dataset, interleave_datasets
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..concept import Concept
from .benchmarks import benchmark_hub_id, is_benchmark, read_benchmark_texts
from .facts import facts_of, held_out_subjects, own_yaml, stand_ins, state_facts
from .user_sources import Source, check_type, is_file_name, is_hub_id, joined, read_named, rows_of, shown, text_rows


logger = logging.get_logger(__name__)
# Facts that follow one another in a phrasing. Each begins as a novice of the one before does, up to what the novice keeps, so that in a
# batch the reference runs that once.
_RUN = 4
BUILTIN_PAIRS = ("capitals-fluent",)
_SAMPLED = (
    *BUILTIN_PAIRS, "cities", "countries", "countries-quiz", "everyday", "everyday-held-out", "places", "quiz", "trivia", "world-quiz",
)  # fmt: skip
BUILTIN_SOURCES = ("capitals", "elements", "capitals-near", "elements-near", *_SAMPLED)


def load_texts(
    source: Source,
    *,
    column: str = "text",
    split: str = "train",
    processing_class: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    what: str = "`source`",
) -> Dataset:
    """Load texts from a source.

    Args:
        source (`str`, `Path`, `Dataset` or `Sequence`):
            Name of a built-in source; path of a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.txt`, `.md`, `.html`, `.pdf`
            or `.docx` file, of a folder of such files or of `save_to_disk`, or a glob pattern; id `org/name` of a dataset
            on the Hub, with its config, split and column where these are not the usual ones
            (`org/name:config,split=train[:100],column=body`); texts of a benchmark, such as `tofu:forget10` (see
            [`read_benchmark_texts`]); a `Dataset`; or the texts, or rows, themselves. Plain text is cut into passages (see
            [`passages`]).
        column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text, or a list of messages. A source without it may have the column `messages`
            instead, or `prompt` and `completion`, whose text is one after the other; the column `prompt` is kept.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub dataset.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer whose chat template is used for messages, and for the conversational phrasings of built-in sources.
        seed (`int`, *optional*, defaults to `0`):
            Seed of a built-in source.
        what (`str`, *optional*, defaults to ``"`source`"``):
            What the texts are for, to begin an error with.

    Returns:
        `Dataset`: with a column `text`, and, where the source has them, the columns `prompt`, with which a text begins that
        is learned from there on, `novice` and `novices`, the same sentences with permuted facts and about other
        subjects. Empty texts are dropped, counted and logged.

    Raises:
        TypeError: for what is not a source, such as a `DatasetDict` or a `DataFrame`.
        ValueError: if the column is missing (the message lists those that exist), a row is not text (the message names
            it, counted from 0), a list holds names of files, or no text is left.
        OSError: if there is nothing of that name, or a file cannot be read.
    """
    if isinstance(source, str) and source in BUILTIN_SOURCES:
        return builtin_texts(source, processing_class, seed)
    if is_benchmark(source):
        parts = iter([(f"{what}, {source!r}", read_benchmark_texts(str(source), what))])
    else:
        parts = _parts(source, what, BUILTIN_SOURCES, split, column)
    rows: list[dict[str, Any]] = []
    for place, part in parts:
        if part is source and not isinstance(part, Dataset):
            _refuse_names(part, what)
        rows += text_rows(part, place, column, processing_class)
    kept = [row for row in rows if row["text"].strip()]
    if not kept:
        raise ValueError(f"{what} is empty: give at least one text with words in it.")
    if len(kept) < len(rows):
        logger.warning(f"{what}: dropped {len(rows) - len(kept)} empty texts of {len(rows)}.")
    names = ["text", *(name for name in ("prompt", "novice", "novices") if any(name in row for row in kept))]
    return Dataset.from_dict({name: [row.get(name) for row in kept] for name in names})


def _parts(
    source: Any, what: str, known: Sequence[str], split: str = "train", column: str = "text"
) -> Iterator[tuple[str, Dataset | Sequence[Any]]]:
    """The data sets or lists of a source, each with what to call it; `known` are the built-in names that a mistyped one may mean."""
    named = isinstance(source, (str, Path))
    parts = read_named(source, what, split=split, column=column, known=known) if named else [(what, source)]
    for place, part in parts:
        check_type(part, place)
        yield place, part


def is_asked_of_the_hub(name: str) -> bool:
    """Whether reading a source needs the Hub: it is a data set there, or a benchmark without a place of its own."""
    if name in BUILTIN_SOURCES:
        return False
    return is_hub_id(name) or (is_benchmark(name) and benchmark_hub_id(name) is not None)


def _refuse_names(source: Any, what: str) -> None:
    """Refuse a list of names in place of texts, which are strings too."""
    named = [
        item for item in source if isinstance(item, (Path, Dataset)) or (isinstance(item, str) and is_file_name(item))
    ]
    if named or (len(source) and all(isinstance(item, str) and item in BUILTIN_SOURCES for item in source)):
        raise ValueError(
            f"{what} is a list of sources, such as {str((named or source)[0])!r}, where a list of texts is needed: give one "
            "source, which may be a folder or a pattern like 'texts/*.txt', or join what `load_texts` gives of each with "
            "`datasets.concatenate_datasets`."
        )


def builtin_texts(name: str, processing_class: PreTrainedTokenizerBase | None = None, seed: int = 0) -> Dataset:
    """Texts of a built-in source; facts about [`held_out_subjects`] are left out.

    `capitals` and `elements` state every fact once in each phrasing, one fact to a text, in a random order in which each phrasing
    is there before any comes again; four facts of a phrasing follow one another, each of which begins as a novice of the one before. Their
    column `novice` holds the same texts with the answers permuted among the facts, and their column `novices` the same texts with
    whatever they name first, subject or answer, replaced by that of other facts. `capitals-near` and `elements-near` are
    other facts about the same subjects, with what stands before the fact as column `prompt`. `everyday` and `countries`
    hold SmolLM2-135M-Instruct's own samples on everyday subjects and on life in countries (examples/sample_retain.py makes
    them), `quiz` and `countries-quiz` short questions with its own answers, `places` where countries lie about which no
    bank asks, `cities` the same of large cities that are not capitals, `world-quiz` and `trivia` questions in many forms on what
    countries are known for and on nature, science, arts and things, neither on what a bank names, `capitals-fluent` its longer
    answers about capitals that name none of them ([`load_pairs`]), and `everyday-held-out` those kept for evaluation.
    """
    if name in _SAMPLED:
        lines = (files(__package__) / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        sampled = [json.loads(line) for line in lines]
        if "text" in sampled[0]:
            return Dataset.from_list(sampled)
        pairs = [(row["prompt"], row["completion"]) for row in sampled]
        return Dataset.from_list([{"prompt": prompt, "text": prompt + rest} for prompt, rest in pairs])
    concept, _, near = name.partition("-")
    held_out = held_out_subjects(concept)
    facts = [fact for fact in facts_of(concept) if fact.subject not in held_out]
    phrasings = own_yaml(f"texts/{concept}.yaml")
    rng = random.Random(f"{name}-{seed}")
    templates = [template for form in phrasings["near" if near else "forget"].values() for template in form]
    if near:
        rows = state_facts(facts, templates, rng, processing_class, near=True)
        rng.shuffle(rows)
        return Dataset.from_list(rows)
    others = stand_ins(facts, rng)
    stated = [state_facts([*others], [one], rng, processing_class, others=others) for one in templates]
    return Dataset.from_list(_in_runs(stated, rng))


def _in_runs(stated: Sequence[Sequence[dict[str, Any]]], rng: random.Random) -> list[dict[str, Any]]:
    """The rows of all phrasings in random order, but for runs of `_RUN` that stay together; each phrasing has a turn before any
    has another.
    """
    turns: defaultdict[int, list[Sequence[dict[str, Any]]]] = defaultdict(list)
    for rows in stated:
        runs = [rows[start : start + _RUN] for start in range(0, len(rows), _RUN)]
        for turn, run in enumerate(rng.sample(runs, len(runs))):
            turns[turn].append(run)
    return [row for turn in turns.values() for run in rng.sample(turn, len(turn)) for row in run]


def load_pairs(
    source: Source | Sequence[tuple[str, str]],
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    what: str = "`source`",
) -> list[tuple[str, str]]:
    """Load synthetic pairs of a forget prefix and fluent text that continues it; those with an empty completion are dropped and counted.

    A source is a name of `BUILTIN_PAIRS`, or whatever [`load_texts`] takes, with the columns `prompt` and `completion`, or a list of
    pairs. `capitals-fluent` holds SmolLM2-135M-Instruct's own answers about capitals, less those that name one
    (examples/sample_retain.py makes them). Errors, those of [`load_texts`], begin with `what`.
    """
    if isinstance(source, str) and source in BUILTIN_PAIRS:
        source = str(files(__package__) / "texts" / f"{source}.jsonl")
    pairs = []
    for place, part in _parts(source, what, BUILTIN_PAIRS):
        if not isinstance(part, Dataset):
            part = [_pair_row(row, f"{place}, row {number}") for number, row in enumerate(part)]
        rows, names = rows_of(part, "prompt")
        if missing := sorted({"prompt", "completion"} - set(names)) if rows else []:
            raise ValueError(f"{place} lacks the columns {missing} of pairs; it has {names}: rename or add them.")
        pairs += [joined(row, f"{place}, row {number}", processing_class) for number, row in enumerate(rows)]
    kept = [pair for pair in pairs if pair[1].strip()]
    if pairs and not kept:
        raise ValueError(f"{what} holds no completion with words in it: add them, or give no pairs.")
    if len(kept) < len(pairs):
        logger.warning(f"{what}: dropped {len(pairs) - len(kept)} pairs of {len(pairs)} with an empty completion.")
    return kept


def _pair_row(row: Any, place: str) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if not isinstance(row, (tuple, list)) or len(row) != 2:
        raise ValueError(f"{place} is {shown(row)}, not a pair: give (prompt, completion).")
    return dict(zip(("prompt", "completion"), row, strict=True))


@dataclass
class ConceptSources:
    """The texts of one concept.

    Args:
        forget (source):
            Texts about the concept: whatever [`load_texts`] takes.
        retain (source or `list` of sources):
            Unrelated (and neighboring) texts. Several sources are taken in turn; one that is listed twice gives twice as
            many. Texts themselves are a list in this list.
        synthetic (source or `Sequence[tuple[str, str]]`, *optional*):
            Pairs of a forget prefix and fluent text that moves on: whatever [`load_pairs`] takes.
        share (`int`, *optional*, defaults to `1`):
            Rows of this concept in a turn. With shares of 2 and 1, rows go first, first, second, and so on.
    """

    forget: Source
    retain: Source | Sequence[Source]
    synthetic: Source | Sequence[tuple[str, str]] = ()
    share: int = 1


def build_erasure_dataset(
    concepts: Mapping[str | Concept, ConceptSources],
    *,
    size: int | None = None,
    column: str | Mapping[str, str] = "text",
    characters: tuple[int, int] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> Dataset:
    """Bundle forget, retain and synthetic texts into one dataset.

    Args:
        concepts (`Mapping[str | Concept, ConceptSources]`):
            Sources by name of the concept, or by the [`Concept`] itself, whose keywords then stand in the contexts of
            [`ElmTrainer`]. Several concepts interleave row by row.
        size (`int`, *optional*):
            Rows per concept, times its share; sources cycle up to it or are cut to it. Defaults to the longest source of
            the concept.
        column (`str` or `Mapping[str, str]`, *optional*, defaults to `"text"`):
            Column of the sources that holds the text, or `{"forget": …, "retain": …}` where they differ.
        characters (`tuple[int, int]`, *optional*):
            Shortest and longest forget and retain text in characters: shorter ones are dropped, longer ones cut.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer whose chat template is used for messages, and for the conversational phrasings of built-in sources.
        seed (`int`, *optional*, defaults to `0`):
            Seed of built-in sources.

    Returns:
        `Dataset`: columns `concept`, `forget`, `novice`, `novices`, `retain`, `retain_prompt`, `prompt`, `completion`.
        `retain_prompt` is the beginning of the retain text that is given and not learned, empty where all of it is, from
        sources with the columns `prompt` and `completion`; `novice` holds the forget text with permuted facts, or an
        empty string where the source has none; `novices`, a list, the same text with its subject replaced by others of
        its kind, for the counterfactual novice (see [`counterfactuals`]); `prompt` and `completion` are empty
        where no synthetic pairs are given. Where a [`Concept`] is given, there is also `keywords`, those of the row's
        concept, joined by commas (empty for a mere name). Empty texts are dropped, counted and logged.

    Raises:
        TypeError: if `concepts` does not map names to [`ConceptSources`], or a source is not one of texts.
        ValueError: if there are no concepts, two have the same name, one has custom contexts, a forget or retain set is
            empty or all too short, `size` or a share is below 1, `column` names something else, and whatever [`load_texts`] refuses.
        OSError: if there is nothing of a source's name, or a file cannot be read.
    """
    columns = _columns(column)
    named = _by_name(concepts, size)
    described = any(isinstance(concept, Concept) for concept in concepts)
    parts = []
    for name, (keywords, sources) in named.items():
        read = partial(load_texts, processing_class=processing_class, seed=seed)
        what = f"The forget set of concept {name!r}"
        forget = _cut(read(sources.forget, what=what, column=columns["forget"]).to_list(), characters, what)
        what = f"The retain set of concept {name!r}"
        given = list(sources.retain) if isinstance(sources.retain, (list, tuple)) else [sources.retain]
        if not given:
            raise ValueError(f"{what} is empty: give at least one source of retain text.")
        keys = [str(source) if isinstance(source, (str, Path)) else id(source) for source in given]
        retain = {
            key: _cut(read(source, what=what, column=columns["retain"]).to_list(), characters, what)
            for key, source in dict(zip(keys, given, strict=True)).items()
        }
        synthetic = () if sources.synthetic is None else sources.synthetic
        what = f"The synthetic set of concept {name!r}"
        pairs = load_pairs(synthetic, processing_class=processing_class, what=what) or [("", "")]
        longest = max(len(forget), len(pairs), *(len(some) * len(keys) for some in retain.values()))
        rows = size * sources.share if size else longest
        if size and rows < len(forget):
            logger.info(f"Concept {name!r}: {len(forget) - rows} of {len(forget)} forget texts lie beyond `size`.")
        # Each source is repeated from where it was, one that is listed twice too.
        retained = {key: cycle(some) for key, some in retain.items()}
        made = []
        for row in range(rows):
            forgotten, kept = forget[row % len(forget)], next(retained[keys[row % len(keys)]])
            prompt, completion = pairs[row % len(pairs)]
            made.append(
                {
                    "concept": name,
                    "forget": forgotten["text"],
                    "novice": forgotten.get("novice") or "",
                    "novices": list(forgotten.get("novices") or []),
                    "retain": kept["text"],
                    "retain_prompt": kept.get("prompt") or "",
                    "prompt": prompt,
                    "completion": completion,
                    **({"keywords": keywords} if described else {}),
                }
            )
        # Dealt out, so that the rows of a turn follow one another when these parts interleave.
        parts += [Dataset.from_list(made[place :: sources.share]) for place in range(min(sources.share, rows))]
    return parts[0] if len(parts) == 1 else interleave_datasets(parts, stopping_strategy="all_exhausted")


def _cut(rows: list[dict[str, Any]], characters: tuple[int, int] | None, what: str) -> list[dict[str, Any]]:
    """The rows whose text is long enough, with all of their texts cut."""
    if characters is None:
        return rows
    shortest, longest = characters
    kept = [row for row in rows if len(row["text"]) >= shortest]
    if not kept:
        raise ValueError(
            f"{what} has {len(rows)} texts, all of fewer than {shortest} characters: lower the first number of `characters`."
        )
    if len(kept) < len(rows):
        logger.info(
            f"{what}: dropped {len(rows) - len(kept)} of {len(rows)} texts, of fewer than {shortest} characters."
        )

    def cut(value: Any) -> Any:
        return [text[:longest] for text in value] if isinstance(value, list) else value and value[:longest]

    return [row | {name: cut(row.get(name)) for name in ("text", "prompt", "novice", "novices")} for row in kept]


def _columns(column: str | Mapping[str, str]) -> Mapping[str, str]:
    if isinstance(column, str):
        return {"forget": column, "retain": column}
    if not isinstance(column, Mapping) or set(column) != {"forget", "retain"}:
        raise ValueError(f"`column` is {column!r}: give one name, or {{'forget': name, 'retain': name}}.")
    return column


def _by_name(
    concepts: Mapping[str | Concept, ConceptSources], size: int | None
) -> dict[str, tuple[str, ConceptSources]]:
    """Keywords and sources of each concept by its name, all checked."""
    fix = 'give {"name": ConceptSources(forget=…, retain=[…])}'
    if not isinstance(concepts, Mapping):
        raise TypeError(f"`concepts` is of type {type(concepts).__name__}: {fix}.")
    if not concepts:
        raise ValueError("`concepts` is empty: name at least one concept with its sources.")
    named: dict[str, tuple[str, ConceptSources]] = {}
    for concept, sources in concepts.items():
        name, keywords = (concept.name, ", ".join(concept.keywords)) if isinstance(concept, Concept) else (concept, "")
        if isinstance(concept, Concept) and concept != Concept(name, concept.keywords):
            raise ValueError(
                f"`concepts` holds {name!r} with contexts of its own, which a dataset does not keep: put the concept into "
                "a YAML file, name that in `concepts` of the config, and give the name here."
            )
        if name in named:
            raise ValueError(f"`concepts` holds {name!r} twice: give all its sources in one `ConceptSources`.")
        if not isinstance(sources, ConceptSources):
            raise TypeError(f"`concepts[{name!r}]` is of type {type(sources).__name__}: {fix}.")
        if type(sources.share) is not int or sources.share < 1:
            raise ValueError(f"`share` of {name!r} is {sources.share}: it must be a whole number of at least 1.")
        named[name] = keywords, sources
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(
            f"`size` is {size}: it must be a whole number of at least 1, or None for as many rows as the longest source."
        )
    return named
