"""Look for what must not be published in a folder that is about to go up."""

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ..data.questions import Question
from .documents import Document, NotWhatItSaysError, pickle_kind, read_documents
from .errors import Finding, ScanError
from .files import PUBLISHED_FILES
from .passages import find_answered, find_passages
from .secrets import find_names, find_paths, find_secrets, machine_names


def scan_folder(
    folder: str | Path,
    *,
    forget: Iterable[str] = (),
    questions: Iterable[Question] = (),
    names: Iterable[str] | None = None,
    allowed: Collection[str] = PUBLISHED_FILES,
) -> list[Finding]:
    """Find what must not be published.

    Found are files that are not on the list, links, pickles whatever their name, and files that are not what their name
    says; and in texts, JSON (escapes resolved), the header of safetensors and the text chunks of PNG pictures: secrets,
    absolute paths, user and host names, passages of forget text, and questions beside their right answer.

    Args:
        folder (`str` or `Path`):
            What would go up.
        forget (`Iterable[str]`, *optional*):
            Forget texts: any twelve words in a row of them, or a shorter one of at least three words as a whole. Rows
            that a chat template rendered go through [`without_template`] first.
        questions (`Iterable[Question]`, *optional*):
            Questions about what was erased, which must not stand beside their right answer.
        names (`Iterable[str]`, *optional*):
            Names of persons and machines. Those of [`machine_names`] by default.
        allowed (`Collection[str]`, *optional*, defaults to `PUBLISHED_FILES`):
            Paths in the folder, with `/`, that may be published.

    Returns:
        `list[Finding]`: by file and line; no finding repeats what was found.

    Raises:
        NotADirectoryError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"`folder` is {folder}, which is no folder: name the staged one.")
    findings: list[Finding] = []
    documents: list[Document] = []
    for path in _entries(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            findings.append(Finding(name, None, "a link, which may lead out of the folder: put a copy in its place"))
        elif path.is_file():
            if name not in allowed:
                findings.append(Finding(name, None, "not among the files that are published: delete it"))
            if kind := pickle_kind(path):
                findings.append(Finding(name, None, f"{kind}, which can run code when it is loaded: delete it"))
            try:
                documents += read_documents(path, name)
            except NotWhatItSaysError as error:
                if name in allowed:
                    findings.append(Finding(name, None, f"{error}: write it again"))
        elif not path.is_dir():
            findings.append(Finding(name, None, "neither a file nor a folder: delete it"))
    people = machine_names() if names is None else frozenset(names)
    asked = list(questions)
    for document in documents:
        findings += _told(document, people, asked)
    findings += [
        _finding(passage.document, passage.line, f"{passage.words} words in a row of a forget text: take them out")
        for passage in find_passages([document for document in documents if not document.vocabulary], forget)
    ]
    return sorted(set(findings), key=lambda finding: (finding.file, finding.line or 0, finding.what))


def raise_findings(findings: Sequence[Finding]) -> None:
    """Raise [`ScanError`] naming each finding with its fix, if there are any."""
    if findings:
        listed = "\n".join(f"- {finding}" for finding in findings)
        raise ScanError(f"Nothing was published. What must not go up ({len(findings)}):\n{listed}", findings)


def _entries(folder: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        raise error

    return sorted(
        Path(root) / name for root, folders, files in os.walk(folder, onerror=stop) for name in (*folders, *files)
    )


def _told(document: Document, names: Collection[str], questions: Sequence[Question]) -> list[Finding]:
    findings = []
    for text in document.readings[:1] if document.vocabulary else document.readings:
        findings += [
            _finding(document, line, f"{kind}: take it out, and revoke it") for line, kind in find_secrets(text)
        ]
        if not document.vocabulary:
            findings += [
                _finding(document, line, "an absolute path of a machine: take it out or make it relative")
                for line in find_paths(text)
            ]
            findings += [
                _finding(
                    document, line, "a user or host name of this machine: take it out, or leave it out of `names`"
                )
                for line in find_names(text, names)
            ]
    if not document.vocabulary:
        findings += [
            _finding(document, line, "a question of the bank beside its right answer: take one of them out")
            for line in find_answered(document, questions)
        ]
    return findings


def _finding(document: Document, line: int, what: str) -> Finding:
    """A finding on a line of the document's text."""
    if document.where:
        return Finding(document.file, None, f"{what} (in {document.where})")
    return Finding(document.file, line + document.first_line - 1, what)
