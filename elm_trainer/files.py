"""Files that survive a killed run: whole or not there, with checksums, and journals of finished work."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What is not whole yet; a process that is killed while it writes leaves one.
UNFINISHED = ".elm-tmp-"
_SEAL = "sha256"
# What a training run writes down about itself in its output folder and beside the adapter that it saves.
RUN_FILE = "erasure_run.json"
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a new path beside `path`; what the block writes there takes the place of `path` once the block has ended.

    A link at `path` is replaced, not followed. What fails leaves an earlier file as it was, and nothing beside it.

    Args:
        path: A file, or a folder that does not exist yet. The folder around it is made.

    Raises:
        OSError: naming `path`, if it could not be written.
    """
    path = Path(path)
    # No name that another process could foresee or take; the ending, since some writers choose a format by it.
    unfinished = path.parent / f"{UNFINISHED}{path.stem[:60]}-{secrets.token_hex(8)}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        if path.is_file() and not path.is_symlink():
            shutil.copymode(path, unfinished)
        for written in [unfinished, *unfinished.rglob("*")]:
            sync(written)
        os.replace(unfinished, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"{path} could not be written ({getattr(error, 'strerror', None) or error}): free some space, or name a folder "
            "that can be written to. An earlier file is as it was",
        ) from error
    finally:
        discard(unfinished)


def discard(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def discard_unfinished(folder: Path) -> None:
    """Delete what writers that were killed have left in a folder in which nobody else writes."""
    for path in folder.glob(f"{UNFINISHED}*"):
        discard(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network drives cannot be asked to.
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, as [`replacing`] does."""
    with replacing(path) as unfinished:
        # "x": fails rather than follow a link.
        with unfinished.open("xb") as file:
            file.write(text.encode())


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a report or the like as JSON, as [`replacing`] does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, as [`replacing`] does."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file, and wait until it is on the disk. Raises `OSError` naming `path` if it could not be written.

    It begins a new line, also behind half a line that a killed process has left, and is added in one piece, so that
    several processes may add to one file.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        with open(handle, "r+b", buffering=0) as file:
            size = os.fstat(handle).st_size
            begun = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            content = ("\n" * begun + line + "\n").encode()
            while content:
                content = content[file.write(content) :]
        sync(path)
        if not existed:
            sync(path.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror}): free some space, or name a folder that can be written to. "
            "What is in it stays, and the next run continues from there",
        ) from error


def read_lines(path: Path, what: str) -> Iterator[tuple[int, Any]]:
    """The lines of a JSON-lines file that is there, by number from 1, without empty ones; `None` for what is not JSON.

    Args:
        what: What it is, such as "journal", for the error where it can't be read.

    Raises:
        OSError: if it can't be read.
    """
    if not path.exists():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(
            error.errno, f"The {what} {path} cannot be read ({error.strerror}): move away what is there"
        ) from error
    # Not `splitlines`: text in a line may hold what that takes for its end.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line:
            try:
                yield number, json.loads(line)
            # Of bytes that are not text, and of a nesting that Python does not follow, too.
            except (ValueError, RecursionError):
                yield number, None


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record that JSON can hold, as JSON holds it, with its checksum."""
    held = json.loads(json.dumps(record))
    return held | {_SEAL: json_sha256(held)}


def unsealed(record: Any) -> dict[str, Any] | None:
    """The record without its checksum; `None` if it has none, or differs from what was sealed."""
    if not isinstance(record, dict) or _SEAL not in record:
        return None
    content = {key: value for key, value in record.items() if key != _SEAL}
    return content if record[_SEAL] == json_sha256(content) else None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` for anything else, and `OSError` if it can't be read."""
    try:
        # Of bytes that are not text, and of a nesting that Python does not follow, too.
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"no JSON object, but {type(value).__name__}")
    return value


def folder_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of every file in a folder and the folders in it, after each was synced to the disk."""
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


def json_sha256(value: Any) -> str:
    """SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def settings_of(settings: Any, later: Sequence[str]) -> dict[str, Any]:
    """The fields of a dataclass for a key of a cache; those of `later` are left out at their defaults, so that caches of before serve."""
    defaults = {one.name: one.default for one in fields(settings) if one.name in later}
    return {name: value for name, value in asdict(settings).items() if name not in defaults or value != defaults[name]}


class Journal:
    """Rows of finished work in a JSON-lines file, kept until the report is written.

    Each row has its checksum. What a killed run or a faulty drive has left of others is skipped, and done again.

    Args:
        path (`str` or `Path`, *optional*): The file; without it nothing is kept.
        identity (`Mapping`): What a row depends on beside its name and settings (models, questions). Rows of another
            identity are left out, and stay in the file.
        over_ranks (`bool`, *optional*, defaults to `False`): Whether the processes of a launch keep it together: the
            first one reads and writes the file, and its rows are those of all.

    Raises:
        OSError: if the file can't be read.
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, Any], *, over_ranks: bool = False):
        # It brings torch, which whoever reads or writes a file need not wait for.
        from .distributed import on_first, processes_and_rank

        self._over_ranks = over_ranks
        self._path = None if path is None or (over_ranks and processes_and_rank()[1] > 0) else Path(path)
        self._identity = json.loads(json.dumps(dict(identity)))
        self._rows: list[dict[str, Any]] = on_first(self._read) if over_ranks else self._read()

    def once(self, name: str, settings: Mapping[str, Any], run: Callable[[], Any]) -> dict[str, Any]:
        """The row `{"name", "settings", "result", "seconds"}`: from the file, or from calling `run` now.

        `run` returns something that JSON can hold; it comes back as JSON holds it (tuples as lists).

        Raises:
            OSError: if the row can't be written.
        """
        from .distributed import from_first

        settings = json.loads(json.dumps(dict(settings)))
        for row in self._rows:
            if (row["name"], row["settings"]) == (name, settings):
                return row
        begun = time.perf_counter()
        row = {"name": name, "settings": settings, "result": run(), "seconds": round(time.perf_counter() - begun, 1)}
        row = json.loads(json.dumps(row | {"identity": self._identity}))
        row = from_first(row) if self._over_ranks else row
        self._rows.append(row)
        if self._path is not None:
            append_line(self._path, json.dumps(sealed(row)))
        return row

    def close(self) -> None:
        """Remove the file: the report is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        if self._path is None:
            return []
        rows = []
        for number, record in read_lines(self._path, "journal"):
            row = unsealed(record)
            if row is not None and row.get("identity") == self._identity:
                rows.append(row)
            elif row is None:
                logger.warning(f"{self._path}, line {number} is damaged or of an earlier version, and is done again.")
        return rows


class MissingRunError(LookupError):
    """A run is not finished yet."""


class Runs:
    """Finished runs of a comparison, one JSON file each, beside which a run may keep more files; they stay.

    Processes of their own make and read them, so that there is nothing to hold in memory as a [`Journal`] does.

    Args:
        folder (`str` or `Path`): Where they lie.
        only_read (`bool`, *optional*, defaults to `False`): Raise [`MissingRunError`] in place of running.
    """

    def __init__(self, folder: str | Path, *, only_read: bool = False):
        self._folder = Path(folder)
        self._only_read = only_read

    def once(self, name: str, depends: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `run`, from its file or from calling it now.

        Args:
            name: What is run, for people who look into the folder.
            depends: Everything its result depends on; with anything else it is another run.
            run: Returns something that JSON can hold; it comes back as JSON holds it.
        """
        path = self.path(name, depends).with_suffix(".json")
        found = self._read(path)
        if found is None:
            if self._only_read:
                raise MissingRunError(f"{path} does not exist, or is damaged.")
            found = sealed({"depends": depends, "result": run()})
            write_json(path, found)
        return found["result"]

    def path(self, name: str, depends: Mapping[str, Any]) -> Path:
        """Where files of a run go, without an ending."""
        return self._folder / f"{name}-{json_sha256(depends)[:16]}"

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            stored = read_object(path)
            # Earlier versions wrote no checksum.
            found = stored if stored.keys() == {"depends", "result"} else unsealed(stored)
        except (OSError, ValueError):
            found = None
        if found is None:
            logger.warning(f"{path} is damaged: it is run again.")
        return found


def store_made(
    folder: Path, files: Mapping[str, Sequence[Mapping[str, Any]]], record: dict[str, Any], name: str
) -> None:
    """Write rows, by name of their file, and a record with the checksums of these; the folder appears when all is there."""
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        for file, rows in files.items():
            write_rows(unfinished / file, rows)
        record["files"] = folder_checksums(unfinished)
        write_json(unfinished / name, record)


def made_before(
    folder: Path, name: str, origin: Mapping[str, Any], what: str, *, quote: str = ""
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The record of what [`store_made`] has written, and the files that were edited since, which are taken as they are.

    Raises `ValueError`, which says `what` is there and puts a `quote` around names, if it was made from things other than `origin`, a
    file is missing or the record cannot be read.
    """
    fix = "name another `output_dir`, or move the folder away to have it made anew"
    try:
        record = read_object(folder / name)
    except (OSError, ValueError) as error:
        raise ValueError(f"`output_dir` has a folder {folder} without a readable {name} ({error}): {fix}.") from error
    before = record.get("origin", {})
    if other := [key for key, value in origin.items() if before.get(key) != value]:
        told = ", ".join(f"{quote}{key}{quote}" for key in other)
        raise ValueError(f"`output_dir` has {what} in {folder} that were made with another {told}: {fix}.")
    edited = []
    for file, checksum in record["files"].items():
        if not (folder / file).is_file():
            raise ValueError(f"`output_dir` lacks {folder / file}, which was made: put it back, or {fix}.")
        if first_damage(folder, {file: checksum}):
            edited.append(file)
    if edited:
        logger.warning(f"{folder}: {', '.join(edited)} changed since they were made, and are taken as they are.")
    return record, tuple(edited)
