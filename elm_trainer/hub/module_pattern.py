"""Regular expressions over names of modules that a stranger wrote: what matching one may cost, told before it is tried."""

import re
from math import comb, prod
from typing import NamedTuple


# Python matches by trying, so some patterns of ten characters take years on a name of fifty. Steps over a name of this
# many characters are counted; the longest names of modules have about a hundred.
_NAME_LENGTH = 64
_LONGEST_PATTERN = 2_000
_MOST_DEPTH = 8
_GROUP = re.compile(r"\((\?:|\?=|\?!|(?!\?))")
_ANCHOR = re.compile(r"\\b|[\^$]")
_LITERAL = re.compile(r"[\w-]|\\[.\-_]")
_DIGITS = re.compile(r"\\d|\[(?:\\d|0-9)\]")
_ANY_OF = re.compile(r"\.|\\w|\[\^?(?:[\w.-]|\\[.\-_wd])+\]")
_TIMES = re.compile(r"([*+?]|\{(\d{1,2})(,(\d{0,2}))?\})\??")


class _Part(NamedTuple):
    """What a part of a pattern costs.

    Args:
        wild (`int`): Parts in it that take any number of characters.
        wild_last (`int`): The same where nothing follows that could fail, so that the last of them is never tried again.
        ways (`int`): In how many ways the rest of it may match at one place.
        text (`str`, *optional*): The only text that it matches, if there is only one.
    """

    wild: int
    wild_last: int
    ways: int
    text: str | None


_NOTHING = _Part(0, 0, 1, "")


def is_plain_name(text: str) -> bool:
    """Whether a text has nothing in it that a regular expression would read as more than a name of a module."""
    return re.fullmatch(r"[\w.-]+", text) is not None


def matching_steps(pattern: str, before: int = 0) -> int:
    """About how many steps matching a pattern against a name takes at the worst.

    Known are names, `.`, `\\d`, `\\w`, `[...]`, `^`, `$` and `\\b`, groups of alternatives and looking ahead. A single character
    may be repeated, a group may only be left out: so there is nothing whose cost grows with every further character.

    Args:
        pattern (`str`): Pattern.
        before (`int`, *optional*, defaults to `0`): How many `.*` whoever matches it puts in front.

    Raises:
        ValueError: if it is too long, invalid, or holds anything else.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, more than {_LONGEST_PATTERN}")
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
    if depth > _MOST_DEPTH:
        raise ValueError(f"its groups are nested more than {_MOST_DEPTH} deep")
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
