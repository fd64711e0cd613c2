"""Whether a free answer names the truth."""

import re
import unicodedata
from collections.abc import Sequence


def names_answer(text: str, answer: str, aliases: Sequence[str] = ()) -> bool:
    """Whether `answer`, or one of its aliases, stands in `text` as words of its own, whatever the accents.

    Case is ignored, save for answers of at most three letters: the symbol `He` is not the word *he*.
    """
    return any(_names(text, name) for name in (answer, *aliases))


def matches_answer(text: str, answer: str, aliases: Sequence[str] = ()) -> bool:
    """Whether `text` *is* the answer or an alias, up to case, accents and the punctuation around it."""
    return any(_bare(text) == _bare(name) for name in (answer, *aliases))


def _names(text: str, answer: str) -> bool:
    if len(answer) > 3:
        text, answer = text.casefold(), answer.casefold()
    return re.search(rf"(?<!\w){re.escape(_without_accents(answer))}(?!\w)", _without_accents(text)) is not None


def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _bare(text: str) -> str:
    return _without_accents(text).casefold().strip(" \t\n.,;:!?\"'*")
