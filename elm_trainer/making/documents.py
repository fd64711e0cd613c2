"""A folder of documents as passages of whole sentences, none of them twice."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from transformers.utils import logging

from ..data.user_sources import check_type, read_named, text_rows


logger = logging.get_logger(__name__)
# Characters of a passage: about 250 tokens at most, and paragraphs are joined until they say something.
LONGEST, SHORTEST = 1000, 200
# What has fewer words is a page number, a heading or a caption.
FEWEST_WORDS = 5
# Chinese, Japanese and Korean are written without spaces: there a character counts as a word.
_WORD = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]|[^\W\u3040-\u9fff\uac00-\ud7af]+")
# Words that are compared at once, and the share of these runs that a text has in common with an earlier one.
SHINGLE, OVERLAP = 5, 0.8
_SENTENCE_END = re.compile(r"(?:[.!?…][\"'”’»)]*\s+|[。！？][\"'”’»)]*\s*)")
# The last that was written is cut off, unless it ends with one of these.
_SENTENCE = re.compile(r"[.!?][\"')]*(?=\s|$)|\n")


@dataclass(frozen=True)
class Documents:
    """Passages of documents."""

    texts: list[str]  # the passages, in the order of the files
    files: dict[str, int]  # how many were kept of each file
    # How many were dropped for which reason: `"short"`, `"exact_duplicate"`, `"near_duplicate"`.
    dropped: dict[str, int]


def read_documents(paths: str | Path | Sequence[str | Path]) -> Documents:
    """Read documents and cut them into passages, without those of fewer than 5 words and the duplicates of [`without_duplicates`].

    They are whatever [`load_texts`] reads from a file or the Hub: text, Markdown, HTML, PDF, Word, JSON lines, CSV, parquet, folders and
    patterns of them, Hub ids. PDF, Word and HTML need the extra `documents`. The rows of a table are not joined as paragraphs are.

    Raises:
        ImportError: if the library for a file is not installed.
        OSError: if there is nothing of a name, or a file cannot be read.
        ValueError: if no path is given, a file is damaged or of an unknown ending, or no passage is left.
    """
    names = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not names or not all(isinstance(name, (str, Path)) for name in names):
        raise ValueError(f"`documents` is {names!r}: name a folder, or files.")
    found: list[tuple[str, str]] = []
    files: dict[str, int] = {}
    for name in names:
        for place, part in read_named(name, "`documents`", split="train", column="text", known=(), cut=chunks):
            check_type(part, place)
            file = place.removeprefix("`documents`, ").strip("'\"")
            files[file] = 0
            # Passages are as they were cut; of tables, rows that are too long are cut now.
            for row in text_rows(part, place, "text"):
                found += [(file, text) for text in chunks(row["text"], LONGEST, LONGEST)]
    whole = [(file, text) for file, text in found if len(normalized(text).split()) >= FEWEST_WORDS]
    kept, dropped = without_duplicates([text for _, text in whole])
    if not kept:
        raise ValueError(
            f"`documents` is {', '.join(map(str, names))}, where none of {len(found)} passages has {FEWEST_WORDS} words: name "
            "documents with text (a PDF of scanned pages has none before its letters are recognized)."
        )
    counts = Counter(whole[index][0] for index in kept)
    dropped = {"short": len(found) - len(whole), **dropped}
    logger.info(f"Documents: kept {len(kept)} passages of {len(files)} files; dropped {dropped}.")
    return Documents([whole[index][1] for index in kept], {file: counts[file] for file in files}, dropped)


def chunks(text: str, longest: int = LONGEST, shortest: int = SHORTEST) -> list[str]:
    """Cut a text into passages of at most `longest` characters, losing nothing but white space between them.

    Paragraphs, which a blank line ends, are joined to at least `shortest` characters, as far as they fit. A longer one is cut
    behind the last sentence that fits, or, where a sentence is longer, behind the last word that fits.
    """
    passages: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for part in _sentences_up_to(paragraph.strip(), longest):
            if passages and len(passages[-1]) < shortest and len(passages[-1]) + 2 + len(part) <= longest:
                passages[-1] += "\n\n" + part
            else:
                passages.append(part)
    return passages


def sentences(text: str) -> list[str]:
    """The sentences of a text, as far as punctuation shows them."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [part for start, end in pairwise([0, *ends, len(text)]) if (part := text[start:end].strip())]


def whole_sentences(text: str) -> str:
    """A text without the sentence or line that was cut off at its end, unless there is no other."""
    ends = [match.end() for match in _SENTENCE.finditer(text.rstrip())]
    return text[: ends[-1]].rstrip() if ends and text[: ends[-1]].strip() else text.rstrip()


def _sentences_up_to(paragraph: str, longest: int) -> Iterable[str]:
    while len(paragraph) > longest:
        head = paragraph[: longest + 1]
        # White space that follows the last sentence may lie beyond.
        ends = [match.end() for match in _SENTENCE_END.finditer(head) if len(head[: match.end()].rstrip()) <= longest]
        space = max((match.start() for match in re.finditer(r"\s", head)), default=0)
        end = (ends[-1] if ends else space) or longest
        yield paragraph[:end].strip()
        paragraph = paragraph[end:].strip()
    if paragraph:
        yield paragraph


def normalized(text: str) -> str:
    """A text in lower case, as words with single spaces between: what is left when form and punctuation do not count."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def whole_words(names: Sequence[str]) -> re.Pattern[str]:
    """What finds any of these names in a text, as whole words and whatever the case, the longest that begins at a place; none of none."""
    some = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"\b(?:{some or '(?!)'})\b", re.IGNORECASE)


def without_duplicates(texts: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """Indices of the texts that are kept, in order, and how many are not, as `"exact_duplicate"` and `"near_duplicate"`.

    A text is an exact duplicate if it equals an earlier one but for case, punctuation and white space, and a near duplicate if
    an earlier one that was kept holds at least 80 % of its runs of five words. Texts of fewer words have no such runs, and are
    only compared whole.
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
