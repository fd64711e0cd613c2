"""`erasure.json`: what an adapter erases from which weights and how it was made, and the check of those weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import logging

from ..files import write_json
from ..fingerprint import base_fingerprint
from .errors import BaseMismatchError, UnsafeAdapterError


logger = logging.get_logger(__name__)

INFO_FILE = "erasure.json"
INFO_SCHEMA = 1
CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
REPORT = "report.json"
REPORT_PLOT = "report.png"
ATTACKS_PLOT = "attacks.png"
INSIDE_PLOT = "inside.png"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PUBLISHED_FILES = frozenset(
    (
        CARD,
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
        INFO_FILE,
        REPORT,
        REPORT_PLOT,
        ATTACKS_PLOT,
        INSIDE_PLOT,
        *TOKENIZER_FILES,
    )
)


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter belongs to.

    Args:
        id (`str`): Hub id.
        revision (`str`): Commit, 40 hexadecimal digits.
        fingerprint (`Mapping[str, str]`): What [`base_fingerprint`] says of its weights.
        license (`str`): License of the base, which the adapter inherits.
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


def check_base(model: PreTrainedModel | PeftModel, expected: Mapping[str, str], base_id: str) -> None:
    """Check that a model has the weights that a fingerprint was taken of.

    A quantized model is compared by the tensors that quantization leaves alone, and the log says so.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): Model at hand.
        expected (`Mapping[str, str]`): What [`base_fingerprint`] said of the base.
        base_id (`str`): Hub id of that base, for the error.

    Raises:
        BaseMismatchError: if the weights are others, or those of a base that is not quantized cannot all be compared.
        ValueError: if weights were offloaded, and are not there to be read.
    """
    try:
        found = base_fingerprint(model)
    except ValueError as error:
        raise ValueError(f"{error} `allow_mismatch=True` continues without the comparison.") from error
    compared = "weights" if "weights" in found and "weights" in expected else "unquantized"
    if compared == "unquantized":
        logger.warning(
            f"The base or the one the adapter was trained on is quantized: only its embeddings, norms and biases were "
            f"compared with {base_id}."
        )
    others_differ = found["unquantized"] != expected.get("unquantized")
    if "weights" in found and "weights" not in expected and not others_differ:
        raise BaseMismatchError(
            f"The adapter was published without a hash of all weights of {base_id}, as one is that was trained on a quantized "
            "base: load the base as it was trained, with `quantization_config`, or pass `allow_mismatch=True` to continue "
            "with weights that were compared in part."
        )
    wanted = expected.get(compared)
    if found[compared] != wanted:
        what = "embeddings, norms or biases" if compared == "unquantized" or others_differ else "weights"
        raise BaseMismatchError(
            f"The base model is not {base_id}, which the adapter was trained on: the {what} differ (fingerprint "
            f"`{compared}` is {found[compared][:12]}…, but {str(wanted)[:12]}… is expected). Load that model and revision, "
            "or pass `allow_mismatch=True` to continue with an adapter that nobody measured on this base."
        )
