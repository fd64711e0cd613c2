"""Reading the metadata of a card that a stranger wrote."""

import re
from typing import Any

import yaml


# A card of this package with a hundred figures has 80 kB, of which 50 are metadata in 4,300 nodes.
MOST_BYTES = 2_000_000
_MOST_NODES = 200_000
_MOST_DEPTH = 20
_LONGEST_TEXT = 10_000
# A tenth of the time of the loader in Python, where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_START = re.compile(r"\s*---(?:\r\n|\r|\n)")
_END = re.compile(r"(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")


def read_metadata(card: str) -> dict[str, Any]:
    """The metadata at the start of a card; empty where it has none.

    A few hundred bytes of YAML can stand for gigabytes, by aliases of aliases, and a number of a megabyte takes minutes to
    convert. So the events of the parser are looked at before any value is made of them.

    Args:
        card (`str`): Contents of a `README.md`.

    Raises:
        ValueError: if the card is too large, or its metadata are no mapping in YAML, are nested too deeply, have too many
            entries or too long ones, use aliases, or hold half a character.
    """
    if len(card) > MOST_BYTES:
        raise ValueError(f"its card has {len(card):,} characters, more than {MOST_BYTES:,}")
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
            if len(event.value) > _LONGEST_TEXT:
                raise ValueError(
                    f"its metadata hold {event.value[:20]!r}… of {len(event.value):,} characters, more than "
                    f"{_LONGEST_TEXT:,}"
                )
            if not event.value.isprintable() and re.search("[\ud800-\udfff]", event.value):
                raise ValueError(f"its metadata hold half a character in {event.value[:20]!r}")
        nodes += isinstance(event, yaml.NodeEvent)
        if depth > _MOST_DEPTH:
            raise ValueError(f"its metadata are nested more than {_MOST_DEPTH} levels deep")
        if nodes > _MOST_NODES:
            raise ValueError(f"its metadata have more than {_MOST_NODES:,} entries")
