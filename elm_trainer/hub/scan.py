"""Look in a folder that is about to go up for what must not be published, as passages of forget text; mask answers."""

import hashlib
import json
import os
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.questions import Question, without_accents
from .errors import Finding, ScanError
from .info import PUBLISHED_FILES
from .persons import find_names, find_paths, find_persons, machine_names
from .secrets import Document, find_secrets, words_of
from .tokens import Hit


logger = logging.get_logger(__name__)
MASK = "▇▇▇"
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
    return sorted(set(findings), key=lambda finding: (finding.file, finding.line or 0, finding.what, finding.id))


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


def _told(document: Document, names: Collection[str], questions: Sequence[Question]) -> Iterator[Finding]:
    # In JSON a backslash begins an escape: the text as it stands holds no path of Windows.
    escaped = document.file.endswith((".json", ".jsonl"))
    for numbers, text, original in _to_read(document):
        breaks = [match.start() for match in re.finditer("\n", text)]
        for hit in find_private(text, names, escaped=escaped and original, vocabulary=document.vocabulary):
            line = numbers[bisect_right(breaks, hit.start)] + 1
            yield _finding(document, line, f"{hit.kind}: {hit.fix}", text[hit.start : hit.end])
    if questions and not document.vocabulary:
        for line, asked in find_answered(document, questions):
            what = "a question of the bank beside its right answer: take one of them out"
            yield _finding(document, line, what, asked)


def _to_read(document: Document) -> Iterator[tuple[Sequence[int], str, bool]]:
    """Places of the lines, text, and whether it stands so in the file: of the first reading all, of others what changed."""
    yield range(document.text.count("\n") + 1), document.text, True
    for before, reading in pairwise([] if document.vocabulary else document.readings):
        lines = reading.split("\n")
        changed = {place for place, (old, new) in enumerate(zip(before.split("\n"), lines, strict=True)) if old != new}
        # With a line on either side, for a name and its value may stand on two.
        near = [place for place in range(len(lines)) if not changed.isdisjoint((place - 1, place, place + 1))]
        yield near, "\n".join(lines[place] for place in near), False


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


# So many words in a row do not match by chance.
RUN = 12
# Shorter texts say too little to tell a passage from a phrase.
SHORTEST = 3
# How far from a question, in lines (escaped ones too) and in words, an answer is taken for its answer.
_ROWS_AFTER = 3
_WORDS_AFTER = 100
_WORDS_BEFORE = 20


def find_passages(documents: Sequence[Document], forget: Iterable[str]) -> list[tuple[Document, int, list[str]]]:
    """Runs of at least twelve words of a forget text, and shorter forget texts as a whole: document, line and words of each.

    Case, accents, line breaks and what stands between words do not matter. The memory needed grows with the documents,
    not with the forget texts.
    """
    texts = iter(forget)
    if (first := next(texts, None)) is None:
        return []
    smalls = [[word.small for word in document.words] for document in documents]
    # Hashes of Python, whose 64 bits make a chance hit as good as impossible.
    published = {run for words in smalls for run in _runs(words, RUN)}
    # By length, the runs to look for: short texts as a whole, and of long ones what was published.
    wanted: dict[int, set[int]] = {}
    for text in chain([first], texts):
        passage = words_of(text)
        length = min(len(passage), RUN)
        if length >= SHORTEST:
            hashes = set(_runs(passage, length))
            wanted.setdefault(length, set()).update(hashes & published if length == RUN else hashes)
    found = []
    for document, words in zip(documents, smalls, strict=True):
        runs = sorted(
            (start, start + length)
            for length, hashes in wanted.items()
            for start, run in enumerate(_runs(words, length))
            if run in hashes
        )
        spans: list[list[int]] = []  # runs that overlap are one passage
        for start, end in runs:
            if spans and start < spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([start, end])
        found += [(document, document.words[start].line, words[start:end]) for start, end in spans]
    return found


def find_answered(document: Document, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
    """Line and words of questions that stand beside their right answer or an alias of it.

    Beside means before the next question, and on the question's line or one of the three that follow.
    """
    asked: dict[tuple[str, ...], list[Question]] = {}
    for question in questions:
        asked.setdefault(words_of(question.text), []).append(question)
    words = document.words
    hits = list(_phrases([word.small for word in words], asked))
    following = [start for start, _ in hits[1:]] + [len(words)]
    floor = 0  # where the question before it ends
    for (start, phrase), ceiling in zip(hits, following, strict=False):
        end = start + len(phrase)
        first, last = words[start].row, words[end - 1].row + _ROWS_AFTER
        before = [word.plain for word in words[max(floor, start - _WORDS_BEFORE) : start] if word.row == first]
        after = [word.plain for word in words[end : min(ceiling, end + _WORDS_AFTER)] if word.row <= last]
        floor = end
        patterns = [
            answer_pattern(name) for question in asked[phrase] for name in (question.answer, *question.aliases)
        ]
        if any(pattern.search(" ".join(part)) for pattern in patterns for part in (before, after)):
            yield words[start].line, " ".join(phrase)


def without_template(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Forget texts without what the tokenizer's chat template put around a question and its reply.

    The template's own words, such as a system prompt, stand in every prompt that is published, and do not count.
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


def _runs(words: Sequence[str], length: int) -> Iterator[int]:
    """Hash of each run of so many words, in order."""
    return (hash(tuple(words[start : start + length])) for start in range(len(words) - length + 1))


def _phrases(words: Sequence[str], phrases: Iterable[tuple[str, ...]]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Place and words of the longest phrase that starts at each word."""
    known = {phrase for phrase in phrases if phrase}
    lengths: dict[str, set[int]] = {}
    for phrase in known:
        lengths.setdefault(phrase[0], set()).add(len(phrase))
    for place, word in enumerate(words):
        for length in sorted(lengths.get(word, ()), reverse=True):
            if (phrase := tuple(words[place : place + length])) in known:
                yield place, phrase
                break


def answer_pattern(answer: str) -> re.Pattern[str]:
    """What finds an answer in a text without accents.

    Follows [`~elm_trainer.data.questions.names_answer`]: words of its own, in any case unless the answer has at most three
    letters. What stands between the words may differ: `Port au Prince` is `Port-au-Prince`.
    """
    plain = without_accents(answer)
    words = re.findall(r"[^\W_]+", plain)
    body = r"[\W_]*".join(map(re.escape, words)) if words else re.escape(plain.strip())
    return re.compile(rf"(?<![^\W_]){body}(?![^\W_])", re.IGNORECASE if len(answer) > 3 else 0)


def mask_answers(text: str, answers: Iterable[str]) -> str:
    """The text with [`MASK`] wherever one of the answers stands."""
    # Each character of the plain text knows the place of the one it came from.
    pieces = [(piece, place) for place, character in enumerate(text) for piece in without_accents(character)]
    plain = "".join(piece for piece, _ in pieces)
    hidden: set[int] = set()
    for answer in filter(str.strip, answers):
        for match in answer_pattern(answer).finditer(plain):
            hidden.update(range(pieces[match.start()][1], pieces[match.end() - 1][1] + 1))
    masked = ""
    for place, character in enumerate(text):
        # Accents that follow the last letter belong to it.
        if place - 1 in hidden and unicodedata.combining(character):
            hidden.add(place)
        masked += character if place not in hidden else MASK * (place - 1 not in hidden)
    return masked
