"""Questions out of passages: beginnings of their sentences that a name, a number or a date continues, and what a writer asks."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.questions import PLAIN, Form, names_answer
from .documents import whole_words
from .fact_writing import asking_prompts
from .writer import Writer


CLOZE = "cloze"
# "I'll" begins no name.
_NAME = r"(?!I['’])[A-ZÀ-ÖØ-Þ][\w'’-]*\w(?: (?:(?:of|de|von|van|la) )?[A-ZÀ-ÖØ-Þ][\w'’-]*\w){0,3}"
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
# The first that fits a place is taken.
_KINDS = {
    "date": rf"\d{{1,2}} (?:{_MONTH})(?: \d{{4}})?|(?:{_MONTH}) \d{{1,2}}(?:, \d{{4}})?",
    "year": r"(?:1[0-9]|20)\d\d(?![\d,.]\d)",
    "number": r"\d+(?:[.,]\d+)*(?: (?:percent|million|billion))?",
    "name": _NAME,
}
_SPAN = re.compile("|".join(rf"(?P<{kind}>(?<![\w.,-]){form}(?![\w-]))" for kind, form in _KINDS.items()))
_SENTENCE = re.compile(r"(?<=[.!?])[\"”’)]*\s+|\n+")
# Words before a span, spans of a sentence, passages that a writer asks about, and words of its answers.
_LEAD_WORDS, _SPANS, _PASSAGES, _ANSWER_WORDS = 4, 2, 96, 6


@dataclass(frozen=True)
class Asked:
    """A question before it has options.

    Attributes:
        text (`str`): The question, or the beginning of a text.
        answer (`str`): The right answer.
        kind (`str`): What is asked for: a relation, or `"name"`, `"year"`, `"date"`, `"number"`, `"term"`.
        key (`str`): What all questions about one fact have in common, which decides its split.
        subject (`str`): What is asked about.
        form, family (`str`): As of [`Question`].
        untrue (`tuple[str, ...]`): Its distractors, or those to draw from; all answers of the same kind where there are none.
        true (`tuple[str, ...]`): Other right answers, which are no distractors.
        close (`frozenset[str]`): The distractors that are taken first.
    """

    text: str
    answer: str
    kind: str
    key: str
    subject: str
    form: Form = "text"
    family: str = CLOZE
    untrue: tuple[str, ...] = ()
    true: tuple[str, ...] = ()
    close: frozenset[str] = frozenset()


def cloze_questions(
    passages: Sequence[str], *, terms: Sequence[str] = (), most: int = 240, seed: int = 0
) -> list[Asked]:
    """Beginnings of sentences that a name, a number or a date continues, or a term.

    The span stands neither at the beginning of the sentence nor earlier in what is shown, which is the sentence up to the span, with the
    sentence before it where this one has named nothing yet.

    Args:
        passages (`Sequence[str]`): Texts.
        terms (`Sequence[str]`, *optional*): Terms of the subject, which are asked for too.
        most (`int`, *optional*, defaults to `240`): Most questions; more are drawn from.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw.
    """
    found: dict[tuple[str, str], Asked] = {}
    of_terms = whole_words(terms)
    for passage in passages:
        before = ""
        for sentence in filter(None, (part.strip() for part in _SENTENCE.split(passage))):
            count, end = 0, 0
            spans = [*of_terms.finditer(sentence), *_SPAN.finditer(sentence)]
            for match in sorted(spans, key=lambda match: (match.start(), -match.end())):
                if match.start() < end:
                    continue  # within the one before it
                end = match.end()
                lead, answer = sentence[: match.start()].rstrip(), match.group()
                if match.lastgroup == "name":
                    answer = answer.removesuffix("'s").removesuffix("’s")
                if len(lead.split()) < _LEAD_WORDS or lead[-1:] in ".!?:\"“‘'(":
                    continue
                named = _names(lead)
                shown = lead if named else f"{before} {lead}".strip()
                if count < _SPANS and not names_answer(shown, answer):
                    subject = (named or _names(before) or [lead])[0]
                    kind = match.lastgroup or "term"
                    found.setdefault(
                        (shown, answer), Asked(shown, answer, kind, f"{kind} {answer.casefold()}", subject)
                    )
                    count += 1
            before = sentence
    asked = list(found.values())
    return random.Random(f"cloze-{seed}").sample(asked, min(most, len(asked)))


def _names(text: str) -> list[str]:
    return [match.group() for match in re.finditer(_NAME, text) if len(match.group()) > 3]


def written_questions(writer: Writer, passages: Sequence[str], *, seed: int = 0) -> tuple[list[Asked], int]:
    """Questions that a writer asks about passages, with answers that stand in them.

    Returns:
        The questions, and how many were dropped since their answer does not stand in the passage, or stands in the question.
    """
    chosen = random.Random(f"passages-{seed}").sample(list(passages), min(_PASSAGES, len(passages)))
    prompts = [asking_prompts()["passage"].format(passage=" ".join(passage.split())) for passage in chosen]
    found: dict[str, Asked] = {}
    dropped = 0
    for passage, text in zip(
        chosen, writer.write(prompts, max_new_tokens=96, temperature=0.3, seed=seed), strict=True
    ):
        own = f"Question:{text}".split("\n\nPassage:")[0]
        for question, answer in re.findall(r"Question: *([^\n]+\?)\s*\n+Answer: *([^\n]+)", own):
            answer = answer.strip(' ."“”')
            if (
                len(answer.split()) <= _ANSWER_WORDS
                and names_answer(passage, answer)
                and not names_answer(question, answer)
            ):
                kind = kind_of(answer)
                subject = (_names(question[1:]) or [question])[0]
                found.setdefault(
                    question, Asked(question, answer, kind, f"{kind} {answer.casefold()}", subject, "question", PLAIN)
                )
            else:
                dropped += 1
    return list(found.values()), dropped


def kind_of(answer: str) -> str:
    """`"name"`, `"year"`, `"date"`, `"number"`, or `"words"` for anything else."""
    match = _SPAN.fullmatch(answer)
    return (match.lastgroup if match else None) or "words"
