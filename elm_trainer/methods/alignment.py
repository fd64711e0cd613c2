"""Align texts with their translations by an anchor dictionary (arXiv 2310.02238, §2.2 and algorithm 1)."""

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.tokens import TokenizedText, text_tokenizer, tokenize
from .anchors import AnchorDictionary, Translation


logger = logging.get_logger(__name__)


class Alignment(NamedTuple):
    """The positions of a text that get a generic label, and the positions of its translation that the label comes from."""

    ids: list[int]
    translated_ids: list[int]  # as far as they are needed
    positions: list[int]  # in the text, ascending
    counterparts: list[int]  # of each, its position in the translation
    # Index in `positions` and token id of each token that begins the translation of an anchor which the text has named before.
    spent: list[tuple[int, int]]


def first_tokens(processing_class: PreTrainedTokenizerBase, words: Sequence[str]) -> dict[str, set[int]]:
    """The tokens with which words begin, at the beginning of a line and after a space."""
    tokens: dict[str, set[int]] = {word: set() for word in words}
    for before in ("\n", "a "):
        for word, text in zip(words, tokenize(processing_class, [before + word for word in words]), strict=True):
            tokens[word].add(text.ids[bisect_right(text.ends, len(before))])
    return tokens


def align(
    translation: Translation,
    original: TokenizedText,
    translated: TokenizedText,
    firsts: Mapping[str, set[int]],
    max_length: int | None = None,
) -> Alignment:
    """Align a text with its translation by characters (arXiv 2310.02238, algorithm 1).

    A position, which predicts the token after it, is aligned with the one up to which the translation of what it has read
    so far goes: outside anchors the two read the same characters, and an anchor's last token goes with the last one of
    its replacement. Not aligned are positions within anchors, those that predict an anchor the text has named before
    (§2.2), and those that a token of the translation runs across.

    Args:
        original: Tokens of the text.
        translated: Tokens of the translation.
        firsts: Tokens with which the replacements begin.
        max_length: Tokens that are kept of either.
    """
    ending_at = defaultdict(list)
    for index, key in enumerate(zip(translated.ends, translated.added, strict=True)):
        ending_at[key].append(index)
    anchor_ends = {anchor.end for anchor in translation.anchors}
    counterparts: dict[int, int] = {}
    ends = list(zip(original.ends, original.added, translation.places(original.ends), strict=True))
    for (end, added, place), group in groupby(range(len(ends)), key=lambda index: ends[index]):
        indices, others = list(group), ending_at.get((place, added), [])
        if not others:
            continue
        # Several tokens end at one character where it is split into bytes.
        same_bytes = [original.ids[i] for i in indices] == [translated.ids[i] for i in others]
        if same_bytes and end not in anchor_ends:
            counterparts.update(zip(indices, others, strict=True))
        else:
            counterparts[indices[-1]] = others[-1]
    named: set[str] = set()
    for anchor in translation.anchors:
        if anchor.term in named:
            counterparts.pop(bisect_right(original.ends, anchor.start) - 1, None)
        named.add(anchor.term)
    limit = len(original.ids) if max_length is None else max_length
    ids = original.ids[:limit]
    # The last position has no token of the text after it.
    positions = [
        index
        for index in sorted(counterparts)
        if index < len(ids) - 1 and (max_length is None or counterparts[index] < max_length)
    ]
    spent: list[tuple[int, int]] = []
    known: set[int] = set()
    anchors = deque(translation.anchors)
    for index, position in enumerate(positions):
        while anchors and anchors[0].end <= original.ends[position]:
            known |= firsts[anchors.popleft().replacement]
        spent += [(index, token) for token in sorted(known)]
    places = [counterparts[position] for position in positions]
    return Alignment(ids, translated.ids[: max(places, default=-1) + 1], positions, places, spent)


def align_texts(
    dictionary: AnchorDictionary,
    texts: Sequence[str],
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> list[Alignment]:
    """Translate texts by a dictionary and align each with its translation.

    Raises:
        ValueError: if no text holds a term of the dictionary, or the tokenizer knows no offsets.
    """
    translations = [dictionary.translate(text) for text in texts]
    replacements = sorted({anchor.replacement for translation in translations for anchor in translation.anchors})
    if not replacements:
        raise ValueError(
            f"`anchors`: none of the {len(dictionary.terms)} terms of the dictionary {dictionary.name!r} "
            f"({', '.join(list(dictionary.terms)[:3])}, ...) stands in any forget text, such as {texts[0][:80]!r}: give a "
            "dictionary of terms that do."
        )
    if not text_tokenizer(processing_class).is_fast:
        raise ValueError(
            f"`processing_class` is a {type(processing_class).__name__}, which knows no character offsets, and WHP aligns "
            "texts by them: load the model's fast tokenizer (`AutoTokenizer.from_pretrained` does where there is one)."
        )
    firsts = first_tokens(processing_class, replacements)
    originals = tokenize(processing_class, texts)
    translated = tokenize(processing_class, [translation.text for translation in translations])
    bare = sum(not translation.anchors for translation in translations)
    if bare:
        logger.warning(
            f"Anchors of {dictionary.name!r}: {bare} of {len(texts)} distinct forget texts hold no term of the "
            "dictionary: their labels come from the reinforced model alone."
        )
    alignments = [align(*row, firsts, max_length) for row in zip(translations, originals, translated, strict=True)]
    labeled = sum(len(alignment.positions) for alignment in alignments)
    total = sum(max(len(alignment.ids) - 1, 0) for alignment in alignments)
    logger.info(f"Anchors of {dictionary.name!r}: {labeled} of {total} positions get a label.")
    return alignments
