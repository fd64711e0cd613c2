"""What is measured streams to disk, so that an interrupted run measures nothing twice."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .sharing import from_first, place


class Journal:
    """Rows of finished work in a JSON-lines file, kept until the report is written.

    Args:
        path (`str` or `Path`, *optional*):
            The file; without it nothing is kept.
        identity (`Mapping`):
            What a row depends on beside its name and settings (models, questions). Rows of another identity are
            left out, and stay in the file.
        over_ranks (`bool`, *optional*, defaults to `False`):
            Whether the processes of a launch keep it together: the first one reads and writes the file, and its rows
            are those of all.
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, Any], *, over_ranks: bool = False):
        self._over_ranks = over_ranks
        self._path = None if path is None or (over_ranks and place()[1] > 0) else Path(path)
        self._identity = json.loads(json.dumps(dict(identity)))
        rows = [row for row in self._read() if row.get("identity") == self._identity]
        self._rows = from_first(rows) if over_ranks else rows

    def once(self, name: str, settings: Mapping[str, Any], run: Callable[[], Any]) -> dict[str, Any]:
        """The row `{"name", "settings", "result", "seconds"}`: from the file, or from calling `run` now.

        `run` returns something that JSON can hold; it comes back as JSON holds it (tuples as lists).
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
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                # A line of its own, behind whatever half line a killed run has left.
                file.write("\n" + json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return row

    def close(self) -> None:
        """Remove the file: the report is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return []
        rows = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # an empty line, or the half line that a killed run may leave
                continue
        return rows
