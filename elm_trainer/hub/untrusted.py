"""Read JSON and YAML that a stranger wrote, within the limits of this page, and write Markdown from it."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import UnsafeAdapterError


# All limits on what strangers wrote. A vocabulary has up to 35 MB; a card of this package with a hundred metrics has
# 80 kB, of which 50 are metadata in 4,300 nodes.
MOST_JSON_BYTES = 10_000_000
MOST_DATA_BYTES = 200_000_000
MOST_HEADER_BYTES = 10_000_000
MOST_YAML_BYTES = 2_000_000
MOST_DEPTH = 20
MOST_YAML_NODES = 200_000
LONGEST_YAML_TEXT = 10_000
LONGEST_FILE_NAME = 255  # bytes, on most systems
LONGEST_TENSOR_NAME = 1_000

LARGEST_RANK = 1 << 16
LARGEST_NUMBER = 1e9
MOST_ENTRIES = 10_000
# PEFT compares each module of the base with each pattern of an adapter: a microsecond mostly, a millisecond at the worst.
LONGEST_PATTERN = 2_000
MOST_GROUPS = 8  # inside one another
MOST_STEPS = 500_000
MOST_PATTERNS = 500

# Parts of a base; the deepest models have two hundred layers, the broadest five hundred experts.
MOST_PARTS = 2_000
MOST_BASE_STEPS = 100_000
# What rendering a chat template may take and write.
TEMPLATE_SECONDS = 2
TEMPLATE_BYTES = 1 << 30
TEMPLATE_CHARACTERS = 200_000

# Attention takes the square of a probe's tokens: a question with a long system prompt has 2,000 characters, 500 tokens.
MOST_PROBES = 1_000
LONGEST_PROBE = 16_000  # characters of the prompt with its answer
MOST_PROBE_TOKENS = 4_096


def short(value: Any) -> str:
    """A value of somebody else as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UnsafeAdapterError: if it is too large, nested too deeply, holds a key twice or is not JSON.
    """
    if path.stat().st_size > MOST_JSON_BYTES:
        raise UnsafeAdapterError(
            f"{path} has {path.stat().st_size} bytes, more than {MOST_JSON_BYTES}: do not load it."
        )
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UnsafeAdapterError(
            f"{path} is not JSON that can be read safely: {error}. Delete {path.resolve()}, and load it again; if that does "
            "not help, do not load it."
        ) from error


def parse_json(raw: bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: if it is nested too deeply, holds a key twice or half a character, or is not JSON.
    """
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep") from error
    depth = max(depth + isinstance(value, dict | list) for _, value, depth in walk(content))
    if depth > MOST_DEPTH:
        raise ValueError(f"it is nested {depth} levels deep, more than {MOST_DEPTH}")
    if re.search(rb"\\u[dD][89a-fA-F]", raw):  # what is written in two halves, both of which must be there
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    return content


def walk(content: Any) -> Iterator[tuple[str, Any, int]]:
    """Every value in parsed JSON, with the key under which it stands (empty in a list) and the number of levels above it."""
    waiting = [("", content, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        yield key, value, depth
        if isinstance(value, dict):
            waiting += [(inner, value[inner], depth + 1) for inner in value]
        elif isinstance(value, list):
            waiting += [("", inner, depth + 1) for inner in value]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of the pairs; of two values under one key, two readers may believe different ones."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key[:100]!r} stands twice")
        content[key] = value
    return content


# A tenth of the time of the loader in Python, where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_START = re.compile(r"\s*---(?:\r\n|\r|\n)")
_END = re.compile(r"(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")


def read_metadata(card: str) -> dict[str, Any]:
    """The metadata at the start of a card; empty where it has none.

    A few hundred bytes of YAML can stand for gigabytes, by aliases of aliases, and a number of a megabyte takes minutes to
    convert. So the events of the parser are looked at before any value is made of them.

    Args:
        card: Contents of a `README.md`.

    Raises:
        ValueError: if the card is too large, or its metadata are no mapping in YAML, are nested too deeply, have too
            many entries or too long ones, use aliases, or hold half a character.
    """
    if len(card) > MOST_YAML_BYTES:
        raise ValueError(f"its card has {len(card):,} characters, more than {MOST_YAML_BYTES:,}")
    card = card.removeprefix("\ufeff")
    start = _START.match(card)
    end = _END.search(card, start.end() - 1) if start else None
    if start is None or end is None:
        return {}
    block = card[start.end() : end.start()]
    try:
        _check_events(block)
        data = yaml.load(block, Loader=_LOADER)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"its metadata are no YAML ({error})") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"its metadata are a {type(data).__name__}, not a mapping")
    return data


def _check_events(block: str) -> None:
    depth = nodes = 0
    for event in yaml.parse(block, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"its metadata use the alias *{str(event.anchor)[:20]}: write out what it stands for")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > LONGEST_YAML_TEXT:
                raise ValueError(
                    f"its metadata hold {event.value[:20]!r}… of {len(event.value):,} characters, more than "
                    f"{LONGEST_YAML_TEXT:,}"
                )
            if not event.value.isprintable() and re.search("[\ud800-\udfff]", event.value):
                raise ValueError(f"its metadata hold half a character in {event.value[:20]!r}")
        nodes += isinstance(event, yaml.NodeEvent)
        if depth > MOST_DEPTH:
            raise ValueError(f"its metadata are nested more than {MOST_DEPTH} levels deep")
        if nodes > MOST_YAML_NODES:
            raise ValueError(f"its metadata have more than {MOST_YAML_NODES:,} entries")


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
