"""`erasure.json`: what an adapter erases from which weights, and how it was made."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.report import write_json
from .errors import UnsafeAdapterError


INFO_FILE = "erasure.json"
INFO_SCHEMA = 1


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter belongs to.

    Args:
        id (`str`): Hub id.
        revision (`str`): Commit, 40 hexadecimal digits.
        fingerprint (`Mapping[str, str]`): What [`base_fingerprint`] says of its weights.
        license (`str`): Licence of the base, which the adapter inherits.
        gguf_file (`str`, *optional*): File in the repository, where the base is a GGUF file.
    """

    id: str
    revision: str
    fingerprint: Mapping[str, str]
    license: str
    gguf_file: str | None = None


@dataclass(frozen=True)
class Probe:
    """A question of the report, the erased model's own answer, and the log-likelihood it gave to that answer.

    Args:
        prompt (`str`): The whole text before the answer, templates included.
        answer (`str`): What the erased model said.
        log_likelihood (`float`): In nats, summed over the answer's tokens.
        tokens (`int`): Tokens of the answer.
    """

    prompt: str
    answer: str
    log_likelihood: float
    tokens: int


@dataclass(frozen=True)
class ErasureInfo:
    """Contents of `erasure.json`.

    Args:
        concepts (`list[str]`): What was erased.
        method (`str`): Trainer that made the adapter.
        base_model ([`BaseModel`]): What it belongs to.
        recipe (`dict`): Settings of `examples/erase.py`, without paths of the machine.
        seed (`int`): Seed of the run.
        versions (`dict[str, str]`): Libraries.
        files (`dict[str, str]`): SHA-256 of every published file but the card and this one.
        verification (`list[Probe]`): What `load_erased(..., verify=True)` runs again.
        allowed (`dict[str, str]`): Why findings of the scan before publishing were let through, by their ids.
    """

    concepts: list[str]
    method: str
    base_model: BaseModel
    recipe: dict[str, Any]
    seed: int
    versions: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)
    verification: list[Probe] = field(default_factory=list)
    allowed: dict[str, str] = field(default_factory=dict)

    def write(self, folder: str | Path) -> None:
        """Write `erasure.json` into `folder`."""
        content = {"schema_version": INFO_SCHEMA} | asdict(self)
        if not self.allowed:  # which readers of earlier versions do not know
            del content["allowed"]
        write_json(Path(folder) / INFO_FILE, content)

    @classmethod
    def read(cls, folder: str | Path) -> "ErasureInfo":
        """Read `erasure.json` of `folder`.

        Raises:
            UnsafeAdapterError: if the file is not what this version writes.
        """
        path = Path(folder) / INFO_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content.pop("schema_version")
            if found != INFO_SCHEMA:
                raise ValueError(f"`schema_version` is {found!r}, but this version reads {INFO_SCHEMA}")
            content["base_model"] = BaseModel(**content["base_model"])
            content["verification"] = [Probe(**probe) for probe in content["verification"]]
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsafeAdapterError(
                f"{path} is not an {INFO_FILE} of elm-trainer ({error}): publish the adapter again, or load it with "
                "`PeftModel.from_pretrained`."
            ) from error
