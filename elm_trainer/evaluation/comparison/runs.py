"""What is finished lies in files of its own, named after all that it depends on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..report import write_json


class MissingRunError(LookupError):
    """A run is not finished yet."""


class Runs:
    """Finished runs of a comparison, one JSON file each.

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
        if not path.exists():
            if self._only_read:
                raise MissingRunError(f"{path} does not exist.")
            write_json(path, {"depends": depends, "result": run()})
        return json.loads(path.read_text(encoding="utf-8"))["result"]

    def path(self, name: str, depends: Mapping[str, Any]) -> Path:
        """Where files of a run go, without an ending."""
        return self._folder / f"{name}-{fingerprint(depends)}"


def fingerprint(value: Any) -> str:
    """A short name of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
