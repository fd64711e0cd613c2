"""Which texts say again what an earlier one says."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence


# Chinese, Japanese and Korean are written without spaces: there a character counts as a word.
_WORD = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]|[^\W\u3040-\u9fff\uac00-\ud7af]+")
# Words that are compared at once, and the share of these runs that a text has in common with an earlier one.
SHINGLE, OVERLAP = 5, 0.8


def normalized(text: str) -> str:
    """A text in lower case, as words with single spaces between: what is left when form and punctuation do not count."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def without_duplicates(texts: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """Which texts are kept, and how many are not.

    A text is an exact duplicate if it equals an earlier one but for case, punctuation and white space, and a near duplicate if
    an earlier one that was kept holds at least 80 % of its runs of five words. Texts of fewer words have no such runs, and are
    only compared whole.

    Args:
        texts (`Sequence[str]`): Texts.

    Returns:
        `tuple[list[int], dict[str, int]]`: indices of the texts that are kept, in order, and the counts `"exact_duplicate"` and
        `"near_duplicate"`.
    """
    kept: list[int] = []
    dropped = {"exact_duplicate": 0, "near_duplicate": 0}
    seen: set[str] = set()
    holders: defaultdict[str, list[int]] = defaultdict(list)  # the kept texts that hold a run of words
    for index, text in enumerate(texts):
        plain = normalized(text)
        runs = _runs(plain)
        shared = Counter(holder for run in runs for holder in holders[run])
        if plain in seen:
            dropped["exact_duplicate"] += 1
        elif runs and max(shared.values(), default=0) >= OVERLAP * len(runs):
            dropped["near_duplicate"] += 1
        else:
            seen.add(plain)
            kept.append(index)
            for run in runs:
                holders[run].append(index)
    return kept, dropped


def _runs(plain: str) -> set[str]:
    words = plain.split()
    return {" ".join(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1)}
