"""Read a file that will be published line by line; find forget passages, and questions beside their answers."""

import json
import pickletools
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..data.questions import Question
from .errors import UnsafeAdapterError
from .safety import read_header
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


# Larger files of text are no part of what is published.
_LONGEST_TEXT = 64 * 2**20
_PICKLE_START = 2**20
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = {
    b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"bKGD", b"hIST", b"pHYs",
    b"sPLT", b"tIME",
}  # fmt: skip
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
# Where a tokenizer's file starts on its vocabulary, and which comes last in it.
_VOCABULARY = '\n  "model": {'
_LINE_BREAK = re.compile(r"\r\n|\n|\r")
# Scripts that put no space between words count by the letter: Thai to Burmese, Khmer, kana, Chinese characters.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


class NotWhatItSaysError(ValueError):
    """The content of a file is not of the kind that its name says."""


class Word(NamedTuple):
    """A word as it stands (less accents), in small letters, its line, and its row, which escaped line breaks count in."""

    plain: str
    small: str
    line: int
    row: int


@dataclass(frozen=True)
class Document:
    """Text found in a file.

    Args:
        file (`str`): Path in the folder.
        text (`str`): The text, lines apart by `\\n`.
        where (`str`, *optional*): Part of the file, where it is not the file itself; its lines are none of the file's.
        first_line (`int`, *optional*, defaults to `1`): Number of the text's first line.
        vocabulary (`bool`, *optional*, defaults to `False`): Whether this is a list of tokens, which holds all kinds of
            names and beginnings of paths, and no sentences.
    """

    file: str
    text: str
    where: str = ""
    first_line: int = 1
    vocabulary: bool = False

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


def read_documents(path: Path, name: str) -> list[Document]:
    """What can be read in a file.

    Raises:
        NotWhatItSaysError: if the content is of another kind than the file's ending says, or cannot be looked into.
    """
    if path.suffix == ".safetensors":
        return [Document(name, _safetensors_header(path), "its header")]
    if path.stat().st_size > _LONGEST_TEXT:
        raise NotWhatItSaysError(f"is larger than {_LONGEST_TEXT // 2**20} MiB, too large to look into")
    content = path.read_bytes()
    if path.suffix == ".png":
        return [Document(name, text, "its text chunks") for text in _png_texts(content)]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise NotWhatItSaysError("is no text in UTF-8, and cannot be looked into") from None
    if "\0" in text:
        raise NotWhatItSaysError("holds bytes that are no text, and cannot be looked into")
    if path.suffix == ".json":
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise NotWhatItSaysError("is no JSON") from None
    text = _LINE_BREAK.sub("\n", text)
    rules, start, vocabulary = text.partition(_VOCABULARY) if path.name == "tokenizer.json" else (text, "", "")
    documents = [Document(name, rules)]
    if vocabulary:
        line = rules.count("\n") + 1
        documents.append(Document(name, start + vocabulary, first_line=line, vocabulary=True))
    return documents


def pickle_kind(path: Path) -> str | None:
    """What kind of pickle a file is, whatever its name; `None` for any other content."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = any(member.lower().endswith((".pkl", ".pickle")) for member in archive.namelist())
        return "a PyTorch archive with a pickle" if pickled else "a zip archive"
    with path.open("rb") as file:
        start = file.read(_PICKLE_START)
    count, last = 0, -1
    try:
        for opcode, _, position in pickletools.genops(BytesIO(start)):
            count += 1
            if opcode.name == "STOP" and position is not None:
                last = position
    except Exception:  # whatever the bytes happen to mean to an opcode's reader
        pass
    # A header of protocol 2 or later says it already; without one a pickle must end with the file.
    headed = re.match(rb"\x80[\x02-\x05]", start) is not None
    ends = last >= 0 and not start[last + 1 :].strip()
    return "a pickle" if count > 2 and (ends or headed and (count > 3 or last >= 0)) else None


def _safetensors_header(path: Path) -> str:
    try:
        read_header(path)
    except UnsafeAdapterError:
        raise NotWhatItSaysError("is no sound safetensors file of floating-point tensors") from None
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")).decode("utf-8")


def _png_texts(content: bytes) -> list[str]:
    if not content.startswith(_PNG_SIGNATURE):
        raise NotWhatItSaysError("is no PNG picture")
    texts, place, kind = [], len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        head = content[place : place + 8]
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        data = content[place + 8 : place + 8 + length]
        place += 12 + length
        if len(head) < 8 or place > len(content):
            raise NotWhatItSaysError("is no whole PNG picture")
        if kind in _PNG_TEXTS:
            texts.append(_png_text(kind, data))
        elif kind not in _PNG_CHUNKS:
            raise NotWhatItSaysError(f"has a chunk of the kind {kind!r}, which cannot be looked into")
    if place < len(content):
        raise NotWhatItSaysError("holds further bytes behind the picture")
    return texts


def _png_text(kind: bytes, data: bytes) -> str:
    keyword, _, rest = data.partition(b"\0")
    encoding = "latin-1"
    try:
        if kind == b"zTXt":
            rest = _inflated(rest[1:])
        elif kind == b"iTXt":
            encoding = "utf-8"
            language, translated, text = rest[2:].split(b"\0", 2)
            rest = b" ".join((language, translated, _inflated(text) if rest[:1] == b"\1" else text))
    except (zlib.error, ValueError):
        raise NotWhatItSaysError(f"has a {kind.decode()} chunk that cannot be read") from None
    return _LINE_BREAK.sub("\n", f"{keyword.decode('latin-1')}: {rest.decode(encoding, 'replace')}")


def _inflated(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, _LONGEST_TEXT)


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
