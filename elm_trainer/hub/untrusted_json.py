"""Reading JSON that a stranger wrote."""

import json
import re
from pathlib import Path
from typing import Any

from .errors import UnsafeAdapterError


MOST_BYTES = 10_000_000
_MOST_DEPTH = 20


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UnsafeAdapterError: if it is too large, nested too deeply, holds a key twice or is no JSON.
    """
    if path.stat().st_size > MOST_BYTES:
        raise UnsafeAdapterError(f"{path} has {path.stat().st_size} bytes, more than {MOST_BYTES}: do not load it.")
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
        ValueError: if it is nested too deeply, holds a key twice or half a character, or is no JSON.
    """
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        depth = _depth(content)
        if re.search(rb"\\u[dD][89a-fA-F]", raw):  # what is written in two halves, both of which must be there
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} levels deep") from error
    if depth > _MOST_DEPTH:
        raise ValueError(f"it is nested {depth} levels deep, more than {_MOST_DEPTH}")
    return content


def short(value: Any) -> str:
    """A value of somebody else as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def holds_key(content: Any, key: str) -> bool:
    """Whether a key stands anywhere in parsed JSON."""
    if isinstance(content, dict):
        return key in content or any(holds_key(value, key) for value in content.values())
    return isinstance(content, list) and any(holds_key(value, key) for value in content)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two values under one key, two readers may believe different ones.
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} stands twice")
    return content


def _depth(content: Any) -> int:
    if isinstance(content, dict):
        content = list(content.values())
    return 1 + max(map(_depth, content), default=0) if isinstance(content, list) else 0
