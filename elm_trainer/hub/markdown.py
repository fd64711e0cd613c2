"""Markdown out of text that anybody may have written."""

import re
import unicodedata
from collections.abc import Iterable, Sequence


# What could end a cell, begin HTML or escape an escape becomes a named entity, which means the same everywhere.
_ESCAPES = str.maketrans(
    {
        "&": "&amp;",
        "<": "&lt;",
        ">": "&gt;",
        "|": "&vert;",
        "\\": "&bsol;",
        "`": "&grave;",
        "$": "&dollar;",
        **{character: f"\\{character}" for character in "*_[]~"},
    }
)
# What renderers make links or mentions of although nothing marks it: addresses, names, numbers of issues.
_LIVE = re.compile(
    r"(?P<scheme>(?<=\w):(?=//|\w+@))|(?P<www>(?<=\bwww)\.)|(?P<name>@(?=\w))|(?P<number>#(?=\w))", re.I
)
_DEAD = {"scheme": "&colon;", "www": "&period;", "name": "&commat;&NoBreak;", "number": "&num;"}
# They turn the order of what is written around.
_DIRECTIONS = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def plain(text: str) -> str:
    """One line of text without control characters, halves of characters and marks that reverse what is read."""
    text = text.encode("utf-8", "replace").decode("utf-8").translate(_DIRECTIONS)
    text = "".join(" " if unicodedata.category(character) == "Cc" else character for character in text)
    return " ".join(text.split())


def inline(text: str) -> str:
    """Text that shows as it is inside a paragraph or a cell: no mark-up, no HTML, no links and no mentions.

    An `@` before a name is followed by a character that does not show, since mentions are looked for in what is shown.
    """
    return _LIVE.sub(lambda found: _DEAD[str(found.lastgroup)], plain(text).translate(_ESCAPES))


def code(text: str) -> str:
    """Text as a code span."""
    # Between backticks nothing can be escaped, and a `|` still ends the cell.
    text = plain(text)
    bare = text and not set(text) & set("`|\\<>&") and not _LIVE.search(text)
    return f"`{text}`" if bare else f"<code>{inline(text)}</code>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already, or an empty text where there is no row."""
    lines = [list(row) for row in rows]
    if not lines:
        return ""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def fenced(text: str, language: str = "") -> str:
    """A block of code, whatever backticks the text holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
