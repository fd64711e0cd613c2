"""Whether a free answer names the truth."""

import re
import unicodedata


def names_answer(text: str, answer: str) -> bool:
    """Whether `answer` stands in `text` as words of its own, whatever the accents.

    Case is ignored, save for answers of at most three letters: the symbol `He` is not the word *he*.
    """
    if len(answer) > 3:
        text, answer = text.casefold(), answer.casefold()
    return re.search(rf"(?<!\w){re.escape(_without_accents(answer))}(?!\w)", _without_accents(text)) is not None


def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
