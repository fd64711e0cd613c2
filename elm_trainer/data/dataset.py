"""`build_erasure_dataset`: one row per training sample, several concepts interleaved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeAlias

from datasets import Dataset, interleave_datasets
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .sources import load_pairs, load_texts


logger = logging.get_logger(__name__)
Source: TypeAlias = str | Dataset | Sequence[str]


@dataclass
class ConceptSources:
    """The texts of one concept.

    Args:
        forget (`str`, `Dataset` or `Sequence[str]`):
            Texts about the concept.
        retain (`list` of sources):
            Sources of unrelated (and neighbouring) texts, taken in turn. One that is listed twice gives twice as many.
        synthetic (`Sequence[tuple[str, str]]`, `str` or `Dataset`, *optional*):
            Pairs of a forget prefix and fluent text that moves on, or a source of such pairs (see [`load_pairs`]).
    """

    forget: Source
    retain: list[Source]
    synthetic: Sequence[tuple[str, str]] | str | Dataset = ()


def build_erasure_dataset(
    concepts: Mapping[str, ConceptSources],
    *,
    size: int | None = None,
    column: str = "text",
    processing_class: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> Dataset:
    """Bundle forget, retain and synthetic texts into one dataset.

    Args:
        concepts (`Mapping[str, ConceptSources]`):
            Sources by name of the concept. Several concepts interleave row by row.
        size (`int`, *optional*):
            Rows per concept; sources cycle up to it or are cut to it. Defaults to the longest source of the concept.
        column (`str`, *optional*, defaults to `"text"`):
            Column of the sources that holds the text.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer whose chat template built-in sources use.
        seed (`int`, *optional*, defaults to `0`):
            Seed of built-in sources.

    Returns:
        `Dataset`: columns `concept`, `forget`, `novice`, `novices`, `retain`, `retain_prompt`, `prompt`, `completion`.
        `retain_prompt` is the beginning of the retain text that is given and not learned, empty where all of it is, from
        sources with the columns `prompt` and `completion`; `novice` holds the forget text with permuted facts, or an
        empty string where the source has none; `novices`, a list, the same text with its subject replaced by others of
        its kind, for the counterfactual novice (see [`counterfactuals`]); `prompt` and `completion` are empty
        where no synthetic pairs are given. Empty texts are dropped, counted and logged.

    Raises:
        ValueError: if there is no concept, or a forget or retain set is empty.
    """
    if not concepts:
        raise ValueError("`concepts` is empty: name at least one concept with its sources.")
    parts = []
    for name, sources in concepts.items():
        forget = _texts(sources.forget, f"forget set of concept {name!r}", column, processing_class, seed)
        if not sources.retain:
            raise ValueError(f"The retain set of concept {name!r} is empty: give at least one source of retain text.")
        what = f"retain set of concept {name!r}"
        loaded: dict[int | str, list[dict[str, str]]] = {}
        retains = []
        for source in sources.retain:
            key = source if isinstance(source, str) else id(source)
            if key not in loaded:
                loaded[key] = _texts(source, what, column, processing_class, seed)
            retains.append(loaded[key])
        synthetic = sources.synthetic
        pairs = load_pairs(synthetic) if isinstance(synthetic, (str, Dataset)) else list(synthetic)
        rows = size or max(len(forget), len(pairs), *(len(retain) * len(retains) for retain in retains))
        if size and size < len(forget):
            logger.info(f"Concept {name!r}: {len(forget) - size} of {len(forget)} forget texts lie beyond `size`.")
        parts.append(
            Dataset.from_list(
                [
                    {
                        "concept": name,
                        "forget": forget[row % len(forget)]["text"],
                        "novice": forget[row % len(forget)].get("novice") or "",
                        "novices": list(forget[row % len(forget)].get("novices") or []),
                        "retain": kept["text"],
                        "retain_prompt": kept.get("prompt") or "",
                        "prompt": pairs[row % len(pairs)][0] if pairs else "",
                        "completion": pairs[row % len(pairs)][1] if pairs else "",
                    }
                    for row, kept in enumerate(_in_turn(retains, rows))
                ]
            )
        )
    return parts[0] if len(parts) == 1 else interleave_datasets(parts, stopping_strategy="all_exhausted")


def _in_turn(sources: list[list[dict[str, str]]], rows: int) -> list[dict[str, str]]:
    """The sources' texts in turn, each cycling; one that is listed twice goes on where it was."""
    texts = {id(source): cycle(source) for source in sources}
    return [next(texts[id(sources[row % len(sources)])]) for row in range(rows)]


def _texts(
    source: Source, what: str, column: str, processing_class: PreTrainedTokenizerBase | None, seed: int
) -> list[dict[str, str]]:
    loaded = load_texts(source, column=column, processing_class=processing_class, seed=seed).to_list()
    kept = [row for row in loaded if row["text"] and row["text"].strip()]
    if len(kept) < len(loaded):
        logger.warning(f"The {what}: dropped {len(loaded) - len(kept)} empty texts of {len(loaded)}.")
    if not kept:
        raise ValueError(f"The {what} is empty: give at least one text with words in it.")
    return kept
