"""`build_erasure_dataset`: one row per training sample, several concepts interleaved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from datasets import Dataset, interleave_datasets
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..concept import Concept
from .sources import load_pairs, load_texts
from .user_sources import Source


logger = logging.get_logger(__name__)


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
        loaded: dict[int | str, list[dict[str, Any]]] = {}
        retains = []
        for source in given:
            key = str(source) if isinstance(source, (str, Path)) else id(source)
            if key not in loaded:
                loaded[key] = _cut(read(source, what=what, column=columns["retain"]).to_list(), characters, what)
            retains.append(loaded[key])
        synthetic = () if sources.synthetic is None else sources.synthetic
        what = f"The synthetic set of concept {name!r}"
        pairs = load_pairs(synthetic, processing_class=processing_class, what=what) or [("", "")]
        rows = (size or 0) * sources.share or max(
            len(forget), len(pairs), *(len(retain) * len(retains) for retain in retains)
        )
        if size and rows < len(forget):
            logger.info(f"Concept {name!r}: {len(forget) - rows} of {len(forget)} forget texts lie beyond `size`.")
        # Each source is repeated from where it was, one that is listed twice too.
        texts = {id(retain): cycle(retain) for retain in retains}
        made = []
        for row in range(rows):
            forgotten, kept = forget[row % len(forget)], next(texts[id(retains[row % len(retains)])])
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
