"""What can be read in a file that is about to be published, by line, and whether the file is what its name says."""

import json
import pickletools
import re
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from .answers import without_accents
from .errors import UnsafeAdapterError
from .readings import ESCAPED_BREAK, readings
from .tensors import read_header


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
