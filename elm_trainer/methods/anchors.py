"""Anchor dictionaries of WHP (arXiv 2310.02238, §2.2): generic terms for idiosyncratic ones, and texts aligned with their translations."""

import re
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..concept import NO_PRESET, preset_names, read_preset
from ..data.tokens import TokenizedText, text_tokenizer, tokenize


logger = logging.get_logger(__name__)

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SENTENCE_ENDS = ".!?:;|"
_PRESETS = "data/anchors"


class Anchor(NamedTuple):
    """A term that was found in a text: its place there, the dictionary's term, and what stands for it in the text's case."""

    start: int
    end: int
    term: str
    replacement: str


class Translation(NamedTuple):
    """A text in which generic terms stand for the anchored ones, and what was replaced, in order."""

    text: str
    anchors: tuple[Anchor, ...]

    def places(self, ends: Sequence[int]) -> list[int | None]:
        """How many characters of the translation stand for the first `end` characters of the text, for ascending `ends`;
        `None` where the text is cut within an anchor.
        """
        places: list[int | None] = []
        shift, passed = 0, 0
        for end in ends:
            while passed < len(self.anchors) and self.anchors[passed].end <= end:
                anchor = self.anchors[passed]
                shift += len(anchor.replacement) - (anchor.end - anchor.start)
                passed += 1
            inside = passed < len(self.anchors) and self.anchors[passed].start < end
            places.append(None if inside else end + shift)
        return places


@dataclass(frozen=True)
class AnchorDictionary:
    """Generic terms by the idiosyncratic terms they stand for.

    A term is found as a whole word and as it is written, in capitals throughout, and, if it begins in lower case, with
    a first capital; its replacement follows. Between East Asian characters, which are written without spaces, a word
    may begin and end anywhere. Where candidates overlap the longest is taken, and the leftmost of equally long ones.

    Args:
        name (`str`): Name of the concept.
        terms (`Mapping[str, str]`): Replacements by term, such as `{"Hogwarts": "Mystic Academy"}`.

    Raises:
        ValueError: if there are no terms, a term or a replacement is no text or has space around it, or a replacement
            holds a term of the dictionary.
    """

    name: str
    terms: Mapping[str, str]

    def __post_init__(self):
        if not isinstance(self.terms, Mapping) or not self.terms:
            raise ValueError(
                f"The anchors of {self.name!r} are {self.terms!r}: give a mapping of terms to replacements."
            )
        for text in (text for pair in self.terms.items() for text in pair):
            if not isinstance(text, str) or not text or text != text.strip():
                raise ValueError(
                    f"The anchors of {self.name!r} hold {text!r}: a term and its replacement must be text without space "
                    "around it; quote words that YAML takes for something else, such as yes or 1984."
                )
        for term, replacement in self.terms.items():
            if found := self.find(replacement):
                raise ValueError(
                    f"The anchors of {self.name!r} replace {term!r} by {replacement!r}, which holds the term "
                    f"{found[0].term!r} itself: choose another replacement."
                )

    @cached_property
    def _forms(self) -> dict[str, tuple[str, str]]:
        """Term and replacement by the forms in which a term may stand in a text; the dictionary's own spelling goes first."""
        forms = {term: (term, replacement) for term, replacement in self.terms.items()}
        for term, replacement in self.terms.items():
            first, other = term[0].upper() + term[1:], replacement[0].upper() + replacement[1:]
            forms.setdefault(first, (term, other))
            forms.setdefault(term.upper(), (term, replacement.upper()))
        return forms

    def find(self, text: str) -> tuple[Anchor, ...]:
        """The terms in a text, longest first where they overlap, in order of place."""
        candidates = [
            Anchor(start, start + len(form), term, replacement)
            for form, (term, replacement) in self._forms.items()
            for start in _occurrences(form, text)
        ]
        found: list[Anchor] = []
        for anchor in sorted(candidates, key=lambda anchor: (anchor.start - anchor.end, anchor.start)):
            if all(anchor.end <= other.start or other.end <= anchor.start for other in found):
                found.append(anchor)
        return tuple(sorted(found))

    def translate(self, text: str) -> Translation:
        """Replace the terms in a text."""
        anchors = self.find(text)
        pieces, start = [], 0
        for anchor in anchors:
            pieces += [text[start : anchor.start], anchor.replacement]
            start = anchor.end
        return Translation("".join([*pieces, text[start:]]), anchors)


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
    ids = original.ids[:max_length]
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
    if bare := sum(not translation.anchors for translation in translations):
        logger.warning(
            f"Anchors of {dictionary.name!r}: {bare} of {len(texts)} distinct forget texts hold no term of the "
            "dictionary: their labels come from the reinforced model alone."
        )
    alignments = [align(*row, firsts, max_length) for row in zip(translations, originals, translated, strict=True)]
    labeled = sum(len(alignment.positions) for alignment in alignments)
    total = sum(max(len(alignment.ids) - 1, 0) for alignment in alignments)
    logger.info(f"Anchors of {dictionary.name!r}: {labeled} of {total} positions get a label.")
    return alignments


def counterfactuals(texts: Sequence[str], dictionaries: Sequence[AnchorDictionary]) -> Dataset:
    """Forget texts of your own with their counterfactual novices: the concept's terms replaced by others of their kind.

    Args:
        texts (`Sequence[str]`): Texts about the concept.
        dictionaries (`Sequence[AnchorDictionary]`): A dictionary for each draw, such as those of
            several retellings; the more differ, the less a single replacement is learnt in the concept's place.

    Returns:
        `Dataset`: columns `text` and `novices`, a source of [`ConceptSources`]. Texts in which a dictionary finds no term
        hold nothing to erase; they are dropped, counted and logged.

    Raises:
        ValueError: if there is no dictionary, or no text is left.
    """
    if not dictionaries:
        raise ValueError("`dictionaries` is empty: give at least one `AnchorDictionary`.")
    rows = []
    for text in texts:
        translations = [dictionary.translate(text) for dictionary in dictionaries]
        if all(translation.anchors for translation in translations):
            rows.append({"text": text, "novices": [translation.text for translation in translations]})
    if not rows:
        raise ValueError(
            f"None of the {len(texts)} texts holds a term of every dictionary "
            f"({', '.join(dictionary.name for dictionary in dictionaries)}): add terms, such as those of `find_terms`."
        )
    if len(rows) < len(texts):
        logger.warning(
            f"{len(texts) - len(rows)} of {len(texts)} texts hold no term of a dictionary and were dropped."
        )
    return Dataset.from_list(rows)


def load_anchors(name_or_path: str) -> AnchorDictionary:
    """Load a dictionary preset by name, or a dictionary from a YAML file.

    Args:
        name_or_path: A preset, such as `"capitals"`, or the path of a YAML file with `name`, the name of the concept,
            and `anchors`, a mapping of terms to replacements.

    Raises:
        ValueError: for an unknown preset (the message lists them), malformed YAML, an unknown or a missing field, and
            for what [`AnchorDictionary`] refuses.
        OSError: if the file cannot be read.
    """
    record = read_preset("anchors", name_or_path, _PRESETS)
    if record is NO_PRESET:
        raise ValueError(
            f"`anchors` is {name_or_path!r}, which is no preset; use one of {', '.join(preset_names(_PRESETS))}, or the "
            "path of a .yaml file."
        )
    fields = ["name", "anchors"]
    if not isinstance(record, dict) or set(record) != set(fields):
        what = sorted(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"`anchors` file {name_or_path} holds {what}: give exactly the fields {fields}.")
    return AnchorDictionary(record["name"], record["anchors"])


def find_terms(
    texts: Sequence[str],
    *,
    max_zipf: float = 3.5,
    min_count: int = 2,
    common_zipf: float = 5.0,
) -> list[str]:
    """Terms that make English texts idiosyncratic: names (runs of words that are capitalized within sentences) and rare words.

    Frequencies are those of the package wordfreq, which downloads nothing.

    Args:
        max_zipf: Zipf frequency below which a word is rare; 3 is once in a million words, 6 once in a thousand.
        min_count: Fewest occurrences of a term.
        common_zipf: Zipf frequency from which a single capitalized word is no name: 5 is that of the few hundred most
            frequent words, which headings capitalize.

    Returns:
        `list[str]`: the terms, the most frequent in the texts first.

    Raises:
        ImportError: if wordfreq is not installed.
    """
    try:
        from wordfreq import zipf_frequency
    except ImportError as error:
        raise ImportError(
            "Finding rare terms needs the package wordfreq: `pip install wordfreq`, or list the terms yourself."
        ) from error
    words = [list(_words(text)) for text in texts]
    lower = Counter(word for row in words for word, capital, _, _ in row if not capital)
    upper = Counter(word for row in words for word, capital, opens, _ in row if capital and not opens)
    # A name at the beginning of a sentence is told by its other occurrences.
    names = {word for word, count in upper.items() if len(word) > 1 and count > lower[word.lower()]}
    counts: Counter[str] = Counter()
    for row in words:
        for (is_name, _), group in groupby(_runs(row, names), key=lambda entry: entry[:2]):
            run = [word for _, _, word in group]
            if is_name and (len(run) > 1 or zipf_frequency(run[0], "en") < common_zipf):
                counts[" ".join(run)] += 1
            elif not is_name:
                counts.update(word for word in run if word.islower() and zipf_frequency(word, "en") < max_zipf)
    return [term for term, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_count]


def _occurrences(form: str, text: str) -> Iterator[int]:
    start = text.find(form)
    while start >= 0:
        if _breaks(text, start) and _breaks(text, start + len(form)):
            yield start
        start = text.find(form, start + 1)


def _breaks(text: str, place: int) -> bool:
    """Whether a word may begin or end before the character at `place`."""
    if place in (0, len(text)):
        return True
    return not all(
        (character == "_" or unicodedata.category(character)[0] in "LMN")
        and unicodedata.east_asian_width(character) not in "FW"
        for character in text[place - 1 : place + 1]
    )


def _words(text: str) -> Iterator[tuple[str, bool, bool, bool]]:
    """The words of a text, each with whether it is capitalized, opens a sentence, and follows the last by one space."""
    last = -1
    for match in _WORD.finditer(text):
        word = match[0].removesuffix("'s").removesuffix("’s")
        before = text[max(0, match.start() - 4) : match.start()].rstrip(" \t\"'“”‘’«»()[]*_-–—")
        opens = match.start() == 0 or not before or before[-1] == "\n" or before[-1] in _SENTENCE_ENDS
        follows = match.start() == last + 1 and text[last : match.start()] == " "
        yield word, word[0].isupper(), opens, follows
        last = match.start() + len(word)


def _runs(words: Sequence[tuple[str, bool, bool, bool]], names: set[str]) -> Iterator[tuple[bool, int, str]]:
    """The words, each with whether it is part of a name and the number of its run."""
    run, last = 0, False
    for word, _, opens, follows in words:
        is_name = word in names
        if is_name != last or not follows or (opens and is_name):
            run += 1
        last = is_name
        yield is_name, run, word
