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


_WORD = r"[^\W\d_a-zà-öø-ÿ][\w'’.]*(?:-\w+)*"
_NAME = re.compile(rf"{_WORD}(?:(?: (?:of|the|de|da|do|del|du|es|al|el|la|le))* {_WORD}|, D\. ?C\.)*")
# Words at the beginning of a sentence that name nothing, and words that say what kind of thing is named.
_OPENERS = frozenset(
    "a an and answer as at but called certainly currently from he hello here hi how however i i'm if in it it's its known "
    "located no of oh on one question she so some sorry sure thank thanks that the there these they this to today "
    "unfortunately we well what when where which while yes you your".split()
)
_KINDS = frozenset("capital capitals city cities country kingdom nation republic state symbol town the of".split())
_LINK = re.compile(r"(?:\b(?:is|was|are|be|named|called|becomes?)(?: (?:the city of|officially|now))*|:) ?$")


def given_answer(text: str, prompt: str) -> str:
    """What a free answer names in reply to a prompt, without accents and in lower case; empty for an empty answer.

    It is the first name that follows a verb such as *is* or a colon, else the first name of all: "the capital of Kenya
    is São Paulo" gives `"sao paulo"`. The prompt's own words, and words made of them (*Kenyan*), are no answer. An
    answer without a name is given by its first words, so that the same evasion counts as the same answer.

    Args:
        text (`str`): The free answer, or the continuation of a line.
        prompt (`str`): What was asked.
    """
    text = re.sub(r"[*_#`\"“”«»]", "", text).replace("’", "'").strip()
    asked = set(re.findall(r"\w+", _folded(prompt)))
    names, first = [], ""
    for sentence in re.split(r"(?<=\w\w\w[.!?])\s+|\s*[;|→\n]\s*| - ", text):
        for match in _NAME.finditer(sentence):
            words = match.group().strip(" .'").split()
            while words and ((match.start() == 0 and _folded(words[0]) in _OPENERS) or _folded(words[0]) in _KINDS):
                words.pop(0)
            if words and not all(_is_asked(word, asked) for word in words):
                name = _folded(" ".join(words)).removesuffix("'s").strip(" .,'")
                if _LINK.search(sentence[: match.start()]):
                    names.append(name)
                first = first or name
    return (names or [first or " ".join(_folded(text).split()[:4]).strip(" .,:;!?")])[0]


def _is_asked(word: str, asked: set[str]) -> bool:
    """Whether a word stands in the prompt, is made of one that does, or says only what kind of thing is meant."""
    word = _folded(word).removesuffix("'s").strip(".,'")
    stems = [known[: max(4, len(known) - 2)] for known in asked if len(known) >= 4]
    return not word or word in asked | _KINDS | {"of", "the"} or any(word.startswith(stem) for stem in stems)


def _folded(text: str) -> str:
    return _without_accents(text).casefold()
