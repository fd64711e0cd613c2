"""Forget passages, and questions beside their right answers, in what is about to be published."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerBase

from ..data.questions import Question
from .answers import answer_pattern
from .documents import Document, words_of


# So many words in a row are no chance.
RUN = 12
# Shorter texts say too little to tell a passage from a phrase.
SHORTEST = 3
# How far from a question, in lines (escaped ones too) and in words, an answer is taken for its answer.
_ROWS_AFTER = 3
_WORDS_AFTER = 100
_WORDS_BEFORE = 20


@dataclass(frozen=True)
class Passage:
    """Words in a row of a document that stand in a forget text."""

    document: Document
    line: int
    words: int
    text: str


def find_passages(documents: Sequence[Document], forget: Iterable[str]) -> list[Passage]:
    """Runs of at least twelve words of a forget text, and shorter forget texts as a whole.

    Case, accents, line breaks and what stands between words do not matter. The memory needed grows with the documents,
    not with the forget texts.
    """
    texts = iter(forget)
    if (first := next(texts, None)) is None:
        return []
    smalls = [[word.small for word in document.words] for document in documents]
    # Hashes of Python, whose 64 bits make a chance hit as good as impossible.
    published = {run for words in smalls for run in _runs(words)}
    leaked: set[int] = set()
    short: set[tuple[str, ...]] = set()
    for text in chain([first], texts):
        passage = words_of(text)
        if SHORTEST <= len(passage) < RUN:
            short.add(passage)
        leaked |= published.intersection(_runs(passage))
    # Where a passage starts, and how many words it has.
    found: list[dict[int, int]] = []
    for words in smalls:
        long = {place: RUN for place, run in enumerate(_runs(words)) if run in leaked} if leaked else {}
        found.append({place: len(phrase) for place, phrase in _phrases(words, short)} | long if short else long)
    return [
        Passage(document, document.words[start].line, end - start, " ".join(words[start:end]))
        for document, words, runs in zip(documents, smalls, found, strict=True)
        for start, end in _joined(runs)
    ]


def find_answered(document: Document, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
    """Line and words of questions that stand beside their right answer or an alias of it.

    Beside means before the next question, and on the question's line or one of the three that follow.
    """
    asked: dict[tuple[str, ...], list[Question]] = {}
    for question in questions:
        asked.setdefault(words_of(question.text), []).append(question)
    words = document.words
    hits = list(_phrases([word.small for word in words], set(asked)))
    for number, (start, phrase) in enumerate(hits):
        end = start + len(phrase)
        first, last = words[start].row, words[end - 1].row + _ROWS_AFTER
        floor = hits[number - 1][0] + len(hits[number - 1][1]) if number else 0
        ceiling = hits[number + 1][0] if number + 1 < len(hits) else len(words)
        before = [word.plain for word in words[max(floor, start - _WORDS_BEFORE, 0) : start] if word.row == first]
        after = [word.plain for word in words[end : min(ceiling, end + _WORDS_AFTER)] if word.row <= last]
        patterns = [
            answer_pattern(name) for question in asked[phrase] for name in (question.answer, *question.aliases)
        ]
        if any(pattern.search(" ".join(part)) for pattern in patterns for part in (before, after)):
            yield words[start].line, " ".join(phrase)


def without_template(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Forget texts without what the tokenizer's chat template put around a question and its reply.

    The template's own words, such as a system prompt, stand in every prompt that is published, and are no passage.
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


def _runs(words: Sequence[str]) -> Iterator[int]:
    """Hash of each run of words, in order."""
    return (hash(tuple(words[start : start + RUN])) for start in range(len(words) - RUN + 1))


def _phrases(words: Sequence[str], phrases: set[tuple[str, ...]]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Place and words of the longest phrase that starts at each word."""
    lengths: dict[tuple[str, ...], set[int]] = {}
    for phrase in phrases:
        lengths.setdefault(phrase[:2], set()).add(len(phrase))
    for place in range(len(words)):
        candidates = lengths.get(tuple(words[place : place + 2]), set()) | lengths.get((words[place],), set())
        for length in sorted(candidates, reverse=True):
            if (phrase := tuple(words[place : place + length])) in phrases:
                yield place, phrase
                break


def _joined(runs: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Start and end of runs of words, those that overlap as one."""
    start = end = -1
    for place, length in sorted(runs.items()):
        if place >= end:
            if end > start:
                yield start, end
            start = place
        end = max(end, place + length)
    if end > start:
        yield start, end
