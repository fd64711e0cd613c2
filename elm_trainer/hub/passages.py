"""The words of a text: find forget passages and questions beside their answers, and mask answers."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..data.questions import Question
from .secrets import ESCAPED_BREAK, readings


MASK = "▇▇▇"


def without_accents(text: str) -> str:
    """The text in compatibility form, less accents."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def answer_pattern(answer: str) -> re.Pattern[str]:
    """What finds an answer in a text without accents.

    Follows [`~elm_trainer.data.questions.names_answer`]: words of its own, in any case unless the answer has at most three
    letters. What stands between the words may differ: `Port au Prince` is `Port-au-Prince`.
    """
    plain = without_accents(answer)
    words = re.findall(r"[^\W_]+", plain)
    body = r"[\W_]*".join(map(re.escape, words)) if words else re.escape(plain.strip())
    return re.compile(rf"(?<![^\W_]){body}(?![^\W_])", re.IGNORECASE if len(answer) > 3 else 0)


def mask_answers(text: str, answers: Iterable[str]) -> str:
    """The text with [`MASK`] wherever one of the answers stands."""
    # Each character of the plain text knows the place of the one it came from.
    plain, places = [], []
    for place, character in enumerate(text):
        for piece in without_accents(character):
            plain.append(piece)
            places.append(place)
    hidden: set[int] = set()
    for answer in filter(str.strip, answers):
        for match in answer_pattern(answer).finditer("".join(plain)):
            hidden.update(range(places[match.start()], places[match.end() - 1] + 1))
    masked = ""
    for place, character in enumerate(text):
        # Accents that follow the last letter belong to it.
        if place - 1 in hidden and unicodedata.combining(character):
            hidden.add(place)
        if place not in hidden:
            masked += character
        elif place - 1 not in hidden:
            masked += MASK
    return masked


# Scripts that put no space between words count by the letter: Thai to Burmese, Khmer, kana, Chinese characters.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


class Word(NamedTuple):
    """A word as it stands (less accents), in small letters, its line, and its row, which escaped line breaks count in."""

    plain: str
    small: str
    line: int
    row: int


@dataclass(frozen=True)
class Document:
    """Text found in a file, lines apart by `\\n`."""

    file: str  # path in the folder
    text: str
    where: str = ""  # part of the file, where it is not the file itself; its lines are not the file's
    first_line: int = 1
    vocabulary: bool = False  # a list of tokens, which holds all kinds of names and beginnings of paths, no sentences

    @cached_property
    def readings(self) -> list[str]:
        """See [`readings`]; the last one is the plainest."""
        return readings(self.text)

    @cached_property
    def words(self) -> list[Word]:
        """The words of the last reading."""
        words, row = [], 0
        for number, line in enumerate(self.readings[-1].split("\n"), 1):
            for part in line.split(ESCAPED_BREAK):
                row += 1
                words += [Word(word, word.casefold(), number, row) for word in _WORD.findall(without_accents(part))]
        return words


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text as [`Document.words`] has them in small letters."""
    return tuple(word.casefold() for word in _WORD.findall(without_accents(text)))


# So many words in a row do not match by chance.
RUN = 12
# Shorter texts say too little to tell a passage from a phrase.
SHORTEST = 3
# How far from a question, in lines (escaped ones too) and in words, an answer is taken for its answer.
_ROWS_AFTER = 3
_WORDS_AFTER = 100
_WORDS_BEFORE = 20


def find_passages(documents: Sequence[Document], forget: Iterable[str]) -> list[tuple[Document, int, list[str]]]:
    """Runs of at least twelve words of a forget text, and shorter forget texts as a whole: document, line and words of each.

    Case, accents, line breaks and what stands between words do not matter. The memory needed grows with the documents,
    not with the forget texts.
    """
    texts = iter(forget)
    if (first := next(texts, None)) is None:
        return []
    smalls = [[word.small for word in document.words] for document in documents]
    # Hashes of Python, whose 64 bits make a chance hit as good as impossible.
    published = {run for words in smalls for run in _runs(words, RUN)}
    # By length, the runs to look for: short texts as a whole, and of long ones what was published.
    wanted: dict[int, set[int]] = {}
    for text in chain([first], texts):
        passage = words_of(text)
        length = min(len(passage), RUN)
        if length >= SHORTEST:
            hashes = set(_runs(passage, length))
            wanted.setdefault(length, set()).update(hashes & published if length == RUN else hashes)
    found = []
    for document, words in zip(documents, smalls, strict=True):
        runs = sorted(
            (start, start + length)
            for length, hashes in wanted.items()
            for start, run in enumerate(_runs(words, length))
            if run in hashes
        )
        spans: list[list[int]] = []  # runs that overlap are one passage
        for start, end in runs:
            if spans and start < spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([start, end])
        found += [(document, document.words[start].line, words[start:end]) for start, end in spans]
    return found


def find_answered(document: Document, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
    """Line and words of questions that stand beside their right answer or an alias of it.

    Beside means before the next question, and on the question's line or one of the three that follow.
    """
    asked: dict[tuple[str, ...], list[Question]] = {}
    for question in questions:
        asked.setdefault(words_of(question.text), []).append(question)
    words = document.words
    hits = list(_phrases([word.small for word in words], asked))
    following = [start for start, _ in hits[1:]] + [len(words)]
    floor = 0  # where the question before it ends
    for (start, phrase), ceiling in zip(hits, following, strict=False):
        end = start + len(phrase)
        first, last = words[start].row, words[end - 1].row + _ROWS_AFTER
        before = [word.plain for word in words[max(floor, start - _WORDS_BEFORE) : start] if word.row == first]
        after = [word.plain for word in words[end : min(ceiling, end + _WORDS_AFTER)] if word.row <= last]
        floor = end
        patterns = [
            answer_pattern(name) for question in asked[phrase] for name in (question.answer, *question.aliases)
        ]
        if any(pattern.search(" ".join(part)) for pattern in patterns for part in (before, after)):
            yield words[start].line, " ".join(phrase)


def without_template(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Forget texts without what the tokenizer's chat template put around a question and its reply.

    The template's own words, such as a system prompt, stand in every prompt that is published, and do not count.
    """
    if tokenizer.chat_template is None:
        yield from texts
        return
    question, reply = "\ue000", "\ue001"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    before, _, rest = rendered.partition(question)
    between, _, after = rest.partition(reply)
    for text in texts:
        if text.startswith(before) and between in text:
            text = text.removeprefix(before).replace(between, "\n").removesuffix(after)
        yield text


def _runs(words: Sequence[str], length: int) -> Iterator[int]:
    """Hash of each run of so many words, in order."""
    return (hash(tuple(words[start : start + length])) for start in range(len(words) - length + 1))


def _phrases(words: Sequence[str], phrases: Iterable[tuple[str, ...]]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Place and words of the longest phrase that starts at each word."""
    known = {phrase for phrase in phrases if phrase}
    lengths: dict[str, set[int]] = {}
    for phrase in known:
        lengths.setdefault(phrase[0], set()).add(len(phrase))
    for place, word in enumerate(words):
        for length in sorted(lengths.get(word, ()), reverse=True):
            if (phrase := tuple(words[place : place + length])) in known:
                yield place, phrase
                break
