"""Right answers in a text: found whatever their case, accents and punctuation, and masked."""

import re
import unicodedata
from collections.abc import Iterable


MASK = "▇▇▇"


def without_accents(text: str) -> str:
    """The text in compatibility form, less accents."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def answer_pattern(answer: str) -> re.Pattern[str]:
    """What finds an answer in a text without accents.

    Follows [`~elm_trainer.data.answers.names_answer`]: words of its own, in any case unless the answer has at most three
    letters. It also forgives what stands between the words, so that `Port au Prince` is `Port-au-Prince`.
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
    hidden = [False] * len(text)
    for answer in answers:
        if answer.strip():
            for match in answer_pattern(answer).finditer("".join(plain)):
                first, last = places[match.start()], places[match.end() - 1]
                hidden[first : last + 1] = [True] * (last + 1 - first)
    masked = ""
    for place, character in enumerate(text):
        # Accents that follow the last letter belong to it.
        if place and hidden[place - 1] and unicodedata.combining(character):
            hidden[place] = True
        if not hidden[place]:
            masked += character
        elif not place or not hidden[place - 1]:
            masked += MASK
    return masked
