"""The text of documents: plain files, HTML, PDF and Word, which the libraries of the extra `documents` read."""

import re
from collections.abc import Callable
from pathlib import Path


PLAIN_ENDINGS = (".txt", ".md")
DOCUMENT_ENDINGS = (".html", ".htm", ".pdf", ".docx")
# What stands on a page beside its text.
_NO_TEXT = ("script", "style", "noscript", "template", "head", "nav", "footer", "form", "svg", "button")
_BLOCKS = (
    "address", "article", "aside", "blockquote", "dd", "div", "dl", "dt", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5",
    "h6", "header", "hr", "main", "ol", "p", "pre", "section", "table", "ul",
)  # fmt: skip
# A line that is shorter was not wrapped.
WRAPPED = 40


def document_text(path: Path) -> str:
    """The text of a file, paragraphs apart by a blank line.

    Args:
        path (`Path`): A file that ends in one of `PLAIN_ENDINGS` or `DOCUMENT_ENDINGS`. Of a web page, navigation, forms and
            scripts are left out; rows of tables become lines with ` | ` between the cells; of a PDF, lines are joined where
            they were wrapped. What a PDF holds as a picture has no text.

    Raises:
        ImportError: naming the extra, if the library for the file is not installed.
        OSError: if the file cannot be read. What the libraries raise for a damaged file is passed on.
    """
    ending = path.suffix.lower()
    if ending in PLAIN_ENDINGS:
        return path.read_text(encoding="utf-8-sig")
    read: Callable[[Path], str] = {".pdf": _pdf, ".docx": _docx}.get(ending, _html)
    try:
        text = read(path)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{str(path)!r} needs the package {error.name}, which is not installed: pip install 'elm-trainer[documents]', "
            "or save the document as .txt."
        ) from error
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r"[ \t\xa0]*\n[ \t\xa0]*", "\n", text)).strip()


def _pdf(path: Path) -> str:
    from pypdf import PdfReader

    return "\n\n".join(unwrapped(page.extract_text()) for page in PdfReader(path).pages)


def _docx(path: Path) -> str:
    from docx import Document
    from docx.table import Table

    parts = []
    for part in Document(str(path)).iter_inner_content():
        if isinstance(part, Table):
            parts.append("\n".join(" | ".join(cell.text.strip() for cell in row.cells) for row in part.rows))
        else:
            parts.append(part.text)
    return "\n\n".join(parts)


def _html(path: Path) -> str:
    from lxml import html

    content = path.read_bytes()
    try:
        content.decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = None  # the one that the page names
    tree = html.document_fromstring(content, parser=html.HTMLParser(encoding=encoding, remove_comments=True))
    for node in [node for node in tree.iter(*_NO_TEXT) if node.getparent() is not None]:
        node.drop_tree()
    for node in tree.iter():
        inside_pre = node.tag == "pre" or next(node.iterancestors("pre"), None) is not None
        node.text = node.text if inside_pre else _one_line(node.text)
        node.tail = node.tail if inside_pre and node.tag != "pre" else _one_line(node.tail)
        if node.tag in _BLOCKS:
            node.text, node.tail = f"\n\n{node.text or ''}", f"\n\n{node.tail or ''}"
        elif node.tag in ("br", "li", "tr"):
            node.tail = f"\n{node.tail or ''}"
        elif node.tag in ("td", "th") and node.getnext() is not None:
            node.tail = " | "
    return str(tree.text_content())


def _one_line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "")


def unwrapped(text: str) -> str:
    """A text whose lines are joined where they were wrapped: a long line that the next continues, or half a word."""
    lines: list[str] = []
    for line in (line.strip() for line in text.split("\n")):
        before = lines[-1] if lines else ""
        if line[:1].islower() and re.search(r"\w-$", before):
            lines[-1] = before[:-1] + line
        elif line and len(before) > WRAPPED and not re.search(r"[.!?:;|]$", before):
            lines[-1] = f"{before} {line}"
        else:
            lines.append(line)
    return "\n".join(lines)
