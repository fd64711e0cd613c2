"""Checksums of what is kept on disk, so that what was damaged is not taken for what was written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import sync


_SEAL = "sha256"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record that JSON can hold, as JSON holds it, with its checksum."""
    held = json.loads(json.dumps(record))
    return held | {_SEAL: _digest(held)}


def unsealed(record: Any) -> dict[str, Any] | None:
    """The record without its checksum; `None` if it has none, or is not what was sealed."""
    if not isinstance(record, dict) or _SEAL not in record:
        return None
    content = {key: value for key, value in record.items() if key != _SEAL}
    return content if record[_SEAL] == _digest(content) else None


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for anything else."""
    try:
        # Of bytes that are no text, and of a nesting that Python does not follow, too.
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"no JSON object, but {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` for anything else, and `OSError` if it can't be read."""
    return parse_object(path.read_bytes())


def folder_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of every file in a folder and the folders in it, each of which is on the disk by then."""
    found = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    sync(folder)
    return found


def first_damage(folder: Path, checksums: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Which file of a folder is not as it was when its checksums were made, and why; `None` if all are."""
    for name, expected in checksums.items():
        path = folder / name
        try:
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{name} holds {size} bytes in place of {expected['bytes']}"
            if file_sha256(path) != expected["sha256"]:
                return f"{name} was changed after it was written (its SHA-256 is another)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
