"""What is finished lies in files of its own, named after all that it depends on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...checksums import read_object, sealed, unsealed
from ...files import write_json


logger = logging.get_logger(__name__)


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
        found = self._read(path)
        if found is None:
            if self._only_read:
                raise MissingRunError(f"{path} does not exist, or is damaged.")
            found = sealed({"depends": depends, "result": run()})
            write_json(path, found)
        return found["result"]

    def path(self, name: str, depends: Mapping[str, Any]) -> Path:
        """Where files of a run go, without an ending."""
        return self._folder / f"{name}-{fingerprint(depends)}"

    def _read(self, path: Path) -> dict[str, Any] | None:
        """What is in the file of a run; `None` if it is not there or is damaged."""
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


def fingerprint(value: Any) -> str:
    """A short name of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
