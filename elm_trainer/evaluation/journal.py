"""Finished work on disk, so that an interrupted run does nothing twice: small rows in one file, or a file for each run."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..distributed import from_first, on_first, place
from ..files import append_line, json_sha256, read_lines, read_object, sealed, unsealed, write_json


logger = logging.get_logger(__name__)


class Journal:
    """Rows of finished work in a JSON-lines file, kept until the report is written.

    Each row has its checksum. What a killed run or a faulty drive has left of others is skipped, and done again.

    Args:
        path (`str` or `Path`, *optional*):
            The file; without it nothing is kept.
        identity (`Mapping`):
            What a row depends on beside its name and settings (models, questions). Rows of another identity are
            left out, and stay in the file.
        over_ranks (`bool`, *optional*, defaults to `False`):
            Whether the processes of a launch keep it together: the first one reads and writes the file, and its rows
            are those of all.

    Raises:
        OSError: if the file can't be read.
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, Any], *, over_ranks: bool = False):
        self._over_ranks = over_ranks
        self._path = None if path is None or (over_ranks and place()[1] > 0) else Path(path)
        self._identity = json.loads(json.dumps(dict(identity)))
        self._rows: list[dict[str, Any]] = on_first(self._read) if over_ranks else self._read()

    def once(self, name: str, settings: Mapping[str, Any], run: Callable[[], Any]) -> dict[str, Any]:
        """The row `{"name", "settings", "result", "seconds"}`: from the file, or from calling `run` now.

        `run` returns something that JSON can hold; it comes back as JSON holds it (tuples as lists).

        Raises:
            OSError: if the row can't be written.
        """
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
            name (`str`): What is run, for people who look into the folder.
            depends (`Mapping`): Everything its result depends on; with anything else it is another run.
            run (`Callable`): Returns something that JSON can hold; it comes back as JSON holds it.
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
