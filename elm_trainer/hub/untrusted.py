"""What strangers wrote: JSON, headers, patterns and YAML are read within the limits of this page, and Markdown is written from it."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from math import comb, prod
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors import SafetensorError, safe_open

from ..evaluation.tables import markdown_table
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
    """A JSON file; `UnsafeAdapterError` if it is too large, nested too deeply, holds a key twice or is not JSON."""
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
    """JSON; `ValueError` if it is nested too deeply, holds a key twice or half a character, or is not JSON."""
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


_DTYPES = ("F32", "F16", "BF16")


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a safetensors file, by its checked header.

    safetensors itself refuses tensors that overlap, leave gaps, do not fill the file or have other bytes than their shape.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UnsafeAdapterError(f"{path}: the header says it has {length} bytes, but the file has {size}.")
        if length > MOST_HEADER_BYTES:
            raise UnsafeAdapterError(f"{path}: the header has {length} bytes, more than {MOST_HEADER_BYTES}.")
        raw = file.read(length)
    try:
        for name, entry in parse_json(raw).items():
            if len(name) > LONGEST_TENSOR_NAME:
                raise UnsafeAdapterError(f"{path}: a tensor has a name of {len(name)} characters: do not load it.")
            dtype = entry.get("dtype") if name != "__metadata__" else None
            if isinstance(dtype, str) and dtype not in _DTYPES:
                raise UnsafeAdapterError(
                    f"{path}: tensor {name!r} is of the type {short(dtype)}, but adapters are {', '.join(_DTYPES)}."
                )
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (ValueError, AttributeError, SafetensorError) as error:
        raise UnsafeAdapterError(f"{path}: the header cannot be read ({error}): the file is broken.") from error


def is_revision(value: Any) -> bool:
    """Whether a value may be a commit, tag or branch: a path in the cache is made of it."""
    return isinstance(value, str) and re.fullmatch(r"(?!/)(?!.*\.\.)[\w./+-]{0,200}", value) is not None


# Python matches by trying, so some patterns of ten characters take years on a name of fifty. Steps over a name of this
# many characters are counted; the longest names of modules have about a hundred.
_NAME_LENGTH = 64
_GROUP = re.compile(r"\((\?:|\?=|\?!|(?!\?))")
_ANCHOR = re.compile(r"\\b|[\^$]")
_LITERAL = re.compile(r"[\w-]|\\[.\-_]")
_DIGITS = re.compile(r"\\d|\[(?:\\d|0-9)\]")
_ANY_OF = re.compile(r"\.|\\w|\[\^?(?:[\w.-]|\\[.\-_wd])+\]")
_TIMES = re.compile(r"([*+?]|\{(\d{1,2})(,(\d{0,2}))?\})\??")


class _Part(NamedTuple):
    """What a part of a pattern costs."""

    wild: int  # parts in it that take any number of characters
    wild_last: int  # the same where nothing follows that could fail, so that the last of them is never tried again
    ways: int  # in how many ways the rest of it may match at one place
    text: str | None  # the only text that it matches, if there is only one


_NOTHING = _Part(0, 0, 1, "")


def is_plain_name(text: str) -> bool:
    """Whether a text has nothing in it that a regular expression would read as more than a name of a module."""
    return re.fullmatch(r"[\w.-]+", text) is not None


def matching_steps(pattern: str, before: int = 0) -> int:
    """About how many steps matching a pattern, with so many `.*` before it, takes at the worst against a name.

    Known are names, `.`, `\\d`, `\\w`, `[...]`, `^`, `$` and `\\b`, groups of alternatives and looking ahead; for anything else
    `ValueError` is raised. A single character may be repeated, a group may only be left out: so there is nothing whose cost
    grows with every further character.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, more than {LONGEST_PATTERN}")
    part, end = _alternatives(pattern, 0, 0)
    if end < len(pattern):
        raise ValueError(f"it closes a group at {end} that is not open")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error})") from error
    wild = part.wild_last + before
    return comb(_NAME_LENGTH + wild, wild) * part.ways


def _alternatives(pattern: str, place: int, depth: int) -> tuple[_Part, int]:
    """What stands from a place to the end of its group."""
    if depth > MOST_GROUPS:
        raise ValueError(f"its groups are nested more than {MOST_GROUPS} deep")
    choices = []
    while True:
        parts: list[_Part] = []
        while place < len(pattern) and pattern[place] not in "|)":
            part, place = _item(pattern, place, depth)
            parts.append(part)
        choices.append(_sequence(parts))
        if place == len(pattern) or pattern[place] == ")":
            return _one_of(choices), place
        place += 1


def _item(pattern: str, place: int, depth: int) -> tuple[_Part, int]:
    if anchor := _ANCHOR.match(pattern, place):
        return _NOTHING, anchor.end()
    if group := _GROUP.match(pattern, place):
        inner, end = _alternatives(pattern, group.end(), depth + 1)
        if end == len(pattern):
            raise ValueError(f"the group at {place} is not closed")
        end += 1
        if group[1] in ("?=", "?!"):
            # What is ahead ends anywhere.
            return _Part(inner.wild_last, inner.wild_last, inner.ways, ""), end
        if pattern[end : end + 1] == "?":
            return inner._replace(ways=inner.ways + 1, text=None), end + 1
        if _TIMES.match(pattern, end):
            raise ValueError(f"it repeats the group at {place}")
        return inner, end
    for kind in (_LITERAL, _DIGITS, _ANY_OF):
        if found := kind.match(pattern, place):
            break
    else:
        raise ValueError(f"it holds {pattern[place]!r} at {place}, which is none of what is known")
    times, end = _TIMES.match(pattern, found.end()), found.end()
    if times is None:
        return _Part(0, 0, 1, found[0][-1] if kind is _LITERAL else None), end
    end = times.end()
    if times[1] == "?":
        return _Part(0, 0, 2, None), end
    if times[2] is not None and times[4] != "":
        return _Part(0, 0, max(1, int(times[4] or times[2]) - int(times[2]) + 1), None), end
    if kind is _DIGITS:  # which stand in names by twos and threes
        return _Part(0, 0, 3, None), end
    return _Part(1, int(found[0] != "."), 1, None), end


def _sequence(parts: list[_Part]) -> _Part:
    parts = [part for part in parts if part != _NOTHING] or [_NOTHING]
    texts = [part.text for part in parts]
    return _Part(
        sum(part.wild for part in parts),
        sum(part.wild for part in parts[:-1]) + parts[-1].wild_last,
        prod(part.ways for part in parts),
        "".join(text for text in texts if text is not None) if None not in texts else None,
    )


def _one_of(choices: list[_Part]) -> _Part:
    if len(choices) == 1:
        return choices[0]
    ways = sum(choice.ways for choice in choices)
    texts = [choice.text for choice in choices if choice.text is not None]
    if len(texts) == len(choices):
        # Of plain texts only those match at the same place that begin alike.
        ways = max(sum(text.startswith(other) for other in texts) for text in texts)
    return _Part(max(part.wild for part in choices), max(part.wild_last for part in choices), ways, None)


# A tenth of the time of the loader in Python, where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_START = re.compile(r"\s*---(?:\r\n|\r|\n)")
_END = re.compile(r"(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")


def read_metadata(card: str) -> dict[str, Any]:
    """The metadata at the start of a card; empty where it has none, and `ValueError` where they are no mapping within the limits.

    A few hundred bytes of YAML can stand for gigabytes, by aliases of aliases, and a number of a megabyte takes minutes to
    convert. So the events of the parser are looked at before any value is made of them.
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
    lines = markdown_table(header, rows)
    return "\n".join(lines) if lines[2:] else ""


def fenced(text: str, language: str = "") -> str:
    """A block of code, whatever backticks the text holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
