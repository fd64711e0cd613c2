"""Look for what must not be published in a folder that is about to go up."""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..data.questions import Question
from .errors import Finding, ScanError
from .info import PUBLISHED_FILES
from .passages import Document, find_answered, find_passages
from .persons import find_names, find_paths, find_persons, machine_names
from .secrets import find_secrets
from .tokens import Hit


logger = logging.get_logger(__name__)
# Larger files of text are never published.
_LONGEST_TEXT = 64 * 2**20
_PNG_SIGNATURE, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
# Where a tokenizer's file starts on its vocabulary, and which comes last in it.
_VOCABULARY = '\n  "model": {'


class NotWhatItSaysError(ValueError):
    """The content of a file is not of the kind that its name says."""


def scan_folder(
    folder: str | Path,
    *,
    forget: Iterable[str] = (),
    questions: Iterable[Question] = (),
    names: Iterable[str] | None = None,
    allowed: Collection[str] = PUBLISHED_FILES,
) -> list[Finding]:
    """Find what must not be published, by file and line; no finding repeats what was found.

    Found are files that are not on the list, links, and files that are not what their name says; and in texts, JSON
    (escapes resolved), the header of safetensors and the text chunks of PNG pictures: secrets, absolute paths, user and
    host names, passages of forget text, and questions beside their right answer.

    Args:
        folder: What would go up.
        forget: Forget texts: any twelve words in a row of them, or a shorter one of at least three words as a whole. Rows
            that a chat template rendered go through [`without_template`] first.
        questions: Those about what was erased.
        names: Names of persons and machines. Those of [`machine_names`] by default.
        allowed: Paths in the folder, with `/`, that may be published.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"`folder` is {folder}, which is not a folder: name the staged one.")
    findings: list[Finding] = []
    documents: list[Document] = []
    for path in _entries(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            findings.append(_of_file(name, "a link, which may lead out of the folder: put a copy in its place"))
        elif path.is_file():
            if name not in allowed:
                findings.append(_of_file(name, "not among the files that are published: delete it"))
            try:
                documents += _read_documents(path, name)
            except NotWhatItSaysError as error:
                if name in allowed:
                    findings.append(_of_file(name, f"{error}: write it again"))
        elif not path.is_dir():
            findings.append(_of_file(name, "neither a file nor a folder: delete it"))
    people = machine_names() if names is None else frozenset(names)
    asked = list(questions)
    for document in documents:
        findings += _told(document, people, asked)
    prose = [document for document in documents if not document.vocabulary]
    for document, line, words in find_passages(prose, forget):
        what = f"{len(words)} words in a row of a forget text: take them out"
        findings.append(_finding(document, line, what, " ".join(words)))
    return sorted(set(findings), key=lambda finding: (finding.file, finding.line or 0, finding.what))


def raise_findings(findings: Sequence[Finding], allow: Mapping[str, str] | None = None) -> None:
    """Raise [`ScanError`] naming each finding with its fix, but those that `allow` gives a reason for, by id: these are logged."""
    allow = allow or {}
    check_allowed(allow)
    for finding in findings:
        if finding.id in allow:
            logger.warning(f"Allowed: {finding}, because: {allow[finding.id]}")
    for missing in sorted(set(allow) - {finding.id for finding in findings}):
        logger.warning(f"`allow` names {missing}, which is not a finding: leave it out.")
    if left := [finding for finding in findings if finding.id not in allow]:
        listed = "\n".join(f"- {finding}" for finding in left)
        raise ScanError(
            f"Nothing was published. What must not go up ({len(left)}):\n{listed}\nOne that may be public is let through "
            "by `allow={id in brackets: reason}`.",
            left,
        )


def check_allowed(allow: Mapping[str, str]) -> None:
    """Raise `ValueError` unless each finding that is allowed has a reason."""
    for name, reason in allow.items():
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"`allow[{name!r}]` is {reason!r}: say why that finding may be published.")


def find_private(
    text: str, names: Collection[str] = (), *, escaped: bool = False, vocabulary: bool = False
) -> Iterator[Hit]:
    """Everything in one reading of a text that gives away a secret, a person or a machine.

    With `escaped` its backslashes begin escapes. In a `vocabulary`, a list of tokens, only secrets are found.
    """
    yield from find_secrets(text, vocabulary=vocabulary)
    if not vocabulary:
        yield from find_paths(text, escaped=escaped)
        yield from find_persons(text)
        yield from find_names(text, names)


def _entries(folder: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        raise error

    return sorted(
        Path(root) / name for root, folders, files in os.walk(folder, onerror=stop) for name in (*folders, *files)
    )


def _read_documents(path: Path, name: str) -> list[Document]:
    """What can be read in a file; raises [`NotWhatItSaysError`] where it cannot be looked into, too."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                entries = [f"{key}: {value}" for key, value in (file.metadata() or {}).items()]
                return [Document(name, "\n".join([*entries, *file.keys()]), "its header")]
        except SafetensorError:
            raise NotWhatItSaysError("is not a sound safetensors file") from None
    if path.stat().st_size > _LONGEST_TEXT:
        raise NotWhatItSaysError(f"is larger than {_LONGEST_TEXT // 2**20} MiB, too large to look into")
    content = path.read_bytes()
    if path.suffix == ".png":
        return [Document(name, text, "its text chunks") for text in _png_texts(content)]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise NotWhatItSaysError("is not text in UTF-8, and cannot be looked into") from None
    if "\0" in text:
        raise NotWhatItSaysError("holds bytes that are not text, and cannot be looked into")
    if path.suffix == ".json":
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise NotWhatItSaysError("is not JSON") from None
    text = re.sub(r"\r\n?", "\n", text)
    rules, start, vocabulary = text.partition(_VOCABULARY) if path.name == "tokenizer.json" else (text, "", "")
    documents = [Document(name, rules)]
    if vocabulary:
        line = rules.count("\n") + 1
        documents.append(Document(name, start + vocabulary, first_line=line, vocabulary=True))
    return documents


def _png_texts(content: bytes) -> list[str]:
    if not content.startswith(_PNG_SIGNATURE):
        raise NotWhatItSaysError("is not a PNG picture")
    try:
        with Image.open(BytesIO(content), formats=["PNG"]) as picture:
            picture.load()  # text may also follow the pixels
            texts = [f"{key}: {value}" for key, value in picture.info.items()]
    except (OSError, SyntaxError, ValueError):
        raise NotWhatItSaysError("is not a whole PNG picture") from None
    if not content.endswith(_PNG_END):
        raise NotWhatItSaysError("holds further bytes behind the picture")
    return [re.sub(r"\r\n?", "\n", text) for text in texts]


def _told(document: Document, names: Collection[str], questions: Sequence[Question]) -> list[Finding]:
    findings: dict[tuple[int | None, str], Finding] = {}
    # In JSON a backslash begins an escape: the text as it stands holds no path of Windows.
    escaped = document.file.endswith((".json", ".jsonl"))
    for numbers, text, original in _to_read(document):
        breaks = [match.start() for match in re.finditer("\n", text)]
        for hit in find_private(text, names, escaped=escaped and original, vocabulary=document.vocabulary):
            line = numbers[bisect_right(breaks, hit.start)]
            finding = _finding(document, line, f"{hit.kind}: {hit.fix}", text[hit.start : hit.end])
            findings.setdefault((finding.line, finding.id), finding)
    told = list(findings.values())
    if questions and not document.vocabulary:
        told += [
            _finding(document, line, "a question of the bank beside its right answer: take one of them out", asked)
            for line, asked in find_answered(document, questions)
        ]
    return told


def _to_read(document: Document) -> Iterator[tuple[Sequence[int], str, bool]]:
    """Numbers of the lines, text, and whether it stands so in the file: of the first reading all, of others what changed."""
    before: list[str] | None = None
    for reading in document.readings[:1] if document.vocabulary else document.readings:
        lines = reading.split("\n")
        if before is None:
            yield range(1, len(lines) + 1), reading, True
        else:
            # With a line on either side, for a name and its value may stand on two.
            near = {
                number + step
                for number, (old, new) in enumerate(zip(before, lines, strict=True))
                if old != new
                for step in (-1, 0, 1)
            }
            kept = [number for number in sorted(near) if 0 <= number < len(lines)]
            yield [number + 1 for number in kept], "\n".join(lines[number] for number in kept), False
        before = lines


def _of_file(name: str, what: str) -> Finding:
    """A finding on a whole file."""
    return Finding(name, None, what, _id(name, what))


def _finding(document: Document, line: int, what: str, found: str) -> Finding:
    """A finding on a line of the document's text."""
    # The same in any reading: quotes and backslashes around it come and go.
    value = re.sub(r"[^\w@.+/:-]+", "", found)
    name = _id(document.file, what, value)
    if document.where:
        return Finding(document.file, None, f"{what} (in {document.where})", name)
    return Finding(document.file, line + document.first_line - 1, what, name)


def _id(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
