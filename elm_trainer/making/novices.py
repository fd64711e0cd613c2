"""Counterfactual novices of any text: the concept's own names replaced by invented ones of their kind."""

import calendar
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..concept import Concept
from ..data.invented import SMALL_WORDS, invented_name
from ..evaluation.fluency import as_prompt
from ..methods.anchors import Anchor, AnchorDictionary, find_terms
from .documents import chunks, sentences, whole_words


logger = logging.get_logger(__name__)
DRAWS = 2
# Most characters of a piece of a document, about 60 tokens.
PIECE = 240
# How the end of a sentence is asked for.
_QUESTION, _TURN = "Question: {} …\nAnswer: ", "Complete the sentence: {}"
# Rows of one text, each of which keeps another name.
_ROWS = 3
# Words behind the first replaced name, without which a text asks for nothing.
_FEWEST_WORDS = 3
# Share of the texts that must hold a term, below which names are not what the concept consists of.
_FEWEST = 0.5
# Zipf frequencies: above the first a capitalized word is no name, from the second on it may be the head of one ("Street"), below
# the third a word without a capital is one of the concept's own, and below the last it is in no English text.
_FUNCTION_WORD, _HEAD_WORD, _RARE, _UNKNOWN = 6.0, 4.0, 1.5, 1.0
_DATES = frozenset(name.casefold() for names in (calendar.month_name, calendar.day_name) for name in names if name)
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class Novices:
    """Forget texts with counterfactual novices."""

    rows: list[dict[str, Any]]  # rows with `novices`; those that were given where there are none
    terms: list[str] = field(default_factory=list)  # what is replaced
    # How many texts were `given`, hold `no_term` or have `nothing_behind` the first one, and the `rows` that the
    # others became.
    counts: dict[str, int] = field(default_factory=dict)
    why_none: str = ""  # why there are none, or empty


def with_novices(
    rows: Sequence[Mapping[str, str]],
    concept: Concept,
    *,
    terms: Sequence[str] | None = None,
    cut: bool = True,
    processing_class: PreTrainedTokenizerBase | None = None,
    opening: str = "",
    seed: int = 0,
) -> Novices:
    """Give forget texts two counterfactual novices each (`novice="counterfactual"` of [`ElmConfig`]).

    The terms are those of [`own_terms`]. A text becomes a row for each name that it first names behind another, three at
    most: all other names are replaced in the novices and this one is kept, so that the reference is asked for it where
    nothing tells it. A single name is replaced itself. Within a novice the same word is always replaced by the same
    invented word, also where it is part of a longer name; heads of names ("Street" of "Tarn Street") stay, and so do
    numbers and all other words, which are what is asked for.

    Texts that hold no term, or fewer than three words behind it, ask for nothing; they are dropped and counted. Where
    that would be more than half of them, or the package wordfreq is not installed, no text gets novices, and a warning
    and `why_none` say so.

    Args:
        rows (`Sequence[Mapping]`): Rows with `text`; other columns are kept where texts are not cut.
        concept ([`Concept`]): The concept.
        terms (`Sequence[str]`, *optional*): What is replaced, in place of [`own_terms`], such as the terms of [`write_by_terms`]: all of
            them in each novice, since terms that become unknown words are not asked for by one another.
        cut (`bool`, *optional*, defaults to `True`): Whether to cut texts into pieces. A piece begins with each sentence that holds a
            term and has at most 240 characters: what an earlier sentence told would be read there, and not known. Every row of a piece
            then comes three times, as it is, as a question and as a turn of chat that its end answers; in random order, so that the
            first rows tell of all texts alike.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): Tokenizer whose chat template turns of chat take.
        opening (`str`, *optional*): What stands before the first turn of a chat, such as a system prompt: where a text begins with it,
            no name of it is a term, and it stays as it is.
        seed (`int`, *optional*, defaults to `0`): Seed of the invented names.
    """
    given = [dict(row) for row in rows]
    keeps = not terms
    try:
        terms = list(terms or own_terms([row["text"].removeprefix(opening) for row in given], concept))
    except ImportError as error:
        return _without(given, f"{error}")
    if not terms:
        return _without(given, f"no name recurs in the texts, and {concept.name!r} is none")
    known = _words((*terms, *(row["text"] for row in given)))
    heads = _heads(terms) | SMALL_WORDS
    entities = _entities(terms, heads)
    finder = _dictionary(concept.name, terms, heads, random.Random(f"{concept.name}-{seed}"), known)
    pieces: Sequence[dict[str, str]] = given
    if cut:
        pieces = [{"text": piece} for piece in dict.fromkeys(p for row in given for p in _pieces(row["text"], finder))]
    counts = {"given": len(pieces), "no_term": 0, "nothing_behind": 0, "rows": 0}
    made: list[dict[str, Any]] = []
    for piece in pieces:
        text = piece["text"].removeprefix(opening)
        before_it = piece["text"][: len(piece["text"]) - len(text)]
        anchors = finder.find(text)
        found = [anchor.term for anchor in anchors]
        if not found:
            counts["no_term"] += 1
            continue
        order = list(dict.fromkeys(entities[term] for term in found))
        rng = random.Random(f"{text}-{seed}")
        kept: list[int | None] = [None]
        if keeps and len(order) > 1:
            kept = [*sorted(rng.sample(range(1, len(order)), min(_ROWS, len(order) - 1)))]
        before = len(made)
        for place in kept:
            replaced = [term for term in dict.fromkeys(found) if place is None or entities[term] != order[place]]
            first = next(anchor for anchor in anchors if anchor.term in replaced)
            if len(_WORD.findall(text[first.end :])) < _FEWEST_WORDS:
                continue
            drawn = [_dictionary(concept.name, replaced, heads, rng, known) for _ in range(DRAWS)]
            made.append({**piece, "novices": [before_it + dictionary.translate(text).text for dictionary in drawn]})
            if cut:
                ends = [anchor.start for anchor in anchors if anchor.term not in replaced and anchor.start > first.end]
                made += _asked_for(text, ends or _ends(text, first.end, anchors), drawn, rng, processing_class)
        counts["nothing_behind"] += len(made) == before
    if cut:
        random.Random(f"{concept.name}-rows-{seed}").shuffle(made)
    counts["rows"] = len(made)
    dropped = counts["no_term"] + counts["nothing_behind"]
    if dropped > (1 - _FEWEST) * len(pieces):
        return _without(given, f"{dropped} of {len(pieces)} texts hold no name with words behind it")
    logger.info(f"Novices: {len(made)} rows of {len(pieces)} texts; dropped {dropped}, which ask for nothing.")
    return Novices(made, terms, counts)


def invented_dictionary(name: str, terms: Sequence[str], texts: Sequence[str], *, seed: int = 0) -> AnchorDictionary:
    """Invented names for the terms of a concept, as [`with_novices`] draws them: none of their words stands in terms or texts.

    Raises `ImportError` without wordfreq.
    """
    rng = random.Random(f"{name}-{seed}")
    return _dictionary(name, terms, _heads(terms) | SMALL_WORDS, rng, _words((*terms, *texts)))


def own_terms(texts: Sequence[str], concept: Concept) -> list[str]:
    """The concept's own terms in texts: its keywords, names, and words that stand nowhere else.

    Names are the runs of [`find_terms`], also those that stand there once, but for months and days. Of a keyword with
    capitals these are the keyword and its capitalized words, of any other the keyword itself if one of its words is rare.

    Given are those that stand in the texts; the words of no English text also without capitals. Raises `ImportError` without wordfreq.
    """
    found = find_terms(texts, max_zipf=_RARE, min_count=1, common_zipf=_FUNCTION_WORD)
    from wordfreq import zipf_frequency

    terms = [term for term in found if not _dull(term)]
    for keyword in concept.keywords:
        words = _WORD.findall(keyword)
        named = [word for word in words if word[0].isupper() and not _dull(word)]
        if named or any(zipf_frequency(word, "en") < _RARE for word in words):
            terms += [keyword, *named]
    # As in addresses: corvane.example.
    terms += [
        term.lower()
        for term in terms
        if term.isalpha() and term.istitle() and zipf_frequency(term.lower(), "en") < _UNKNOWN
    ]
    everything = "\n".join(texts)
    return [term for term in dict.fromkeys(terms) if whole_words([term]).search(everything)]


def _pieces(text: str, finder: AnchorDictionary) -> list[str]:
    """A document in pieces, each about the terms of one sentence; what follows without a term belongs to them."""
    pieces: list[str] = []
    named = False  # whether the last piece has a term
    for paragraph in chunks(text, PIECE, 1):
        for sentence in sentences(paragraph):
            names = bool(finder.find(sentence))
            if pieces and not (names and named) and len(pieces[-1]) + 1 + len(sentence) <= PIECE:
                pieces[-1] += " " + sentence
                named |= names
            else:
                pieces.append(sentence)
                named = names
    return pieces


def _ends(text: str, start: int, anchors: Sequence[Anchor]) -> list[int]:
    """Where a text may be broken off behind a place: before words that lie in no name."""
    words = [match.start() for match in _WORD.finditer(text, start)]
    return [place for place in words if not any(anchor.start < place < anchor.end for anchor in anchors)]


def _asked_for(
    text: str,
    ends: Sequence[int],
    drawn: Sequence[AnchorDictionary],
    rng: random.Random,
    processing_class: PreTrainedTokenizerBase | None,
) -> Iterator[dict[str, Any]]:
    """A text whose end is asked for, as a question and in a chat, each broken off at one of the places."""
    for frame in (_QUESTION, _TURN) if ends else ():
        place = rng.choice(ends)
        begin, rest = text[:place], text[place:]
        sides = [(begin, rest)]
        sides += [(dictionary.translate(begin).text, dictionary.translate(rest).text) for dictionary in drawn]
        framed = []
        for before, behind in sides:
            asked = frame.format(before.rstrip())
            if frame is _TURN:
                prompt = as_prompt(processing_class, asked) if processing_class is not None else f"{asked}\n"
                asked = prompt if prompt[-1:].isspace() else prompt + " "
            framed.append(asked + behind)
        yield {"text": framed[0], "novices": framed[1:]}


def _without(rows: list[dict[str, Any]], why: str) -> Novices:
    logger.warning(f"The forget texts get no counterfactual novices: {why}. `novice` can be 'contexts'.")
    return Novices(rows, why_none=why)


def _words(texts: Iterable[str]) -> set[str]:
    return {word.casefold() for text in texts for word in re.findall(r"\w+", text)}


def _dull(term: str) -> bool:
    return all(word.casefold() in SMALL_WORDS | _DATES for word in _WORD.findall(term))


def _heads(terms: Sequence[str]) -> set[str]:
    """Words that say of what kind a name is: common ones at the end of several names, and no name by themselves."""
    from wordfreq import zipf_frequency

    split = [[word.casefold() for word in _WORD.findall(term)] for term in terms]
    last = Counter(words[-1] for words in {tuple(words) for words in split if len(words) > 1})
    heads = {word for word, count in last.items() if count > 1 and zipf_frequency(word, "en") >= _HEAD_WORD}
    while alone := {word for words in split if heads.issuperset(words) for word in words}:
        heads -= alone
    return heads


def _entities(terms: Sequence[str], heads: Set[str]) -> dict[str, int]:
    """A number for each term, which those share that share a word but for heads: "Ilse Marrow" and "Marrow"."""
    entities = {term: number for number, term in enumerate(terms)}
    first: dict[str, str] = {}
    for term in terms:
        for word in {word.casefold() for word in _WORD.findall(term)} - heads:
            other = entities[first.setdefault(word, term)]
            mine = entities[term]
            entities = {name: other if number == mine else number for name, number in entities.items()}
    return entities


def _dictionary(
    name: str, replaced: Sequence[str], heads: Set[str], rng: random.Random, known: set[str]
) -> AnchorDictionary:
    """Invented names for terms, in which a word is always replaced by the same."""
    invented: dict[str, str] = {}

    def stand_in(word: str) -> str:
        small = word.casefold()
        if small in heads:
            return word
        while small not in invented:
            new = invented_name(small, rng)
            if not known & set(re.findall(r"\w+", new)) and new not in invented.values():
                invented[small] = new
        new = invented[small]
        if word.isupper() and len(word) > 1:
            return new.upper()
        return new[0].upper() + new[1:] if word[0].isupper() else new

    return AnchorDictionary(name, {term: _WORD.sub(lambda match: stand_in(match[0]), term) for term in replaced})
