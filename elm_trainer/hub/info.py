"""`erasure.json`: what an adapter erases from which weights, and the checks of those weights and of published answers."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.questions import names_answer
from ..data.tokens import tokenize_pair
from ..evaluation.fluency import as_prompt
from ..evaluation.likelihood import log_likelihoods
from ..files import write_json
from ..fingerprint import base_fingerprint, is_quantized
from .errors import BaseMismatchError, UnsafeAdapterError, VerificationError
from .untrusted import LONGEST_PROBE, MOST_PROBE_TOKENS, MOST_PROBES, is_revision


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
PLOTS = (REPORT_PLOT, ATTACKS_PLOT, INSIDE_PLOT)
PUBLISHED_FILES = frozenset((CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT, *PLOTS, *TOKENIZER_FILES))


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
    """A question of the report, the erased model's own answer, and the log-likelihood it gave to that answer."""

    prompt: str  # the whole text before the answer, templates included
    answer: str
    log_likelihood: float  # in nats, summed over the answer's tokens
    tokens: int  # of the answer


@dataclass(frozen=True)
class ErasureInfo:
    """Contents of `erasure.json`."""

    concepts: list[str]
    method: str  # trainer that made the adapter
    base_model: BaseModel
    recipe: dict[str, Any]  # settings of `elm erase`, without paths of the machine
    seed: int
    versions: dict[str, str]  # of libraries
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of every published file but the card and this one
    verification: list[Probe] = field(default_factory=list)  # what `load_erased(..., verify=True)` runs again
    allowed: dict[str, str] = field(default_factory=dict)  # why findings of the scan were let through, by their ids

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

    def fault(self) -> str | None:
        """What is wrong with the fields, if anything: anybody may have written them."""
        base, again = self.base_model, "publish the adapter again"
        if not _are_hashes(base.fingerprint) or not _are_hashes(self.files):
            return f": `fingerprint` and `files` must be tables of SHA-256: {again}"
        if ADAPTER_WEIGHTS not in self.files or "unquantized" not in base.fingerprint:
            return f" holds no hash of {ADAPTER_WEIGHTS} or of the base's weights: {again}"
        if not (isinstance(base.id, str) and is_revision(base.revision) and isinstance(base.gguf_file, str | None)):
            return f": `base_model` needs the id and a commit of the base: {again}"
        if (count := len(self.verification)) > MOST_PROBES:
            return f": `verification` has {count} entries, more than {MOST_PROBES}: do not ask them"
        for place, probe in enumerate(self.verification):
            texts = (probe.prompt, probe.answer)
            if not all(isinstance(text, str) and text for text in texts):
                return f": entry {place} of `verification` needs a prompt and an answer, both texts"
            if (length := sum(map(len, texts))) > LONGEST_PROBE:
                return f": entry {place} of `verification` has {length} characters, more than {LONGEST_PROBE}: do not ask it"
            if type(probe.tokens) is not int or probe.tokens < 1 or type(probe.log_likelihood) not in (int, float):
                return f": entry {place} of `verification` needs `tokens`, a number from 1, and `log_likelihood`"
        return None


def _are_hashes(table: Any) -> bool:
    return isinstance(table, dict) and all(
        isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) for text in table.values()
    )


def check_base(model: PreTrainedModel | PeftModel, expected: Mapping[str, str], base_id: str) -> None:
    """Check that a model has the weights of which [`base_fingerprint`] said what is expected.

    A quantized model is compared by the tensors that quantization leaves alone, and the log says so.

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


def check_same_base(bases: Mapping[str, BaseModel], allow_mismatch: bool) -> None:
    """Compare what adapters, given by their names, say of their bases, before one is loaded.

    Raises:
        BaseMismatchError: if two differ, of which `allow_mismatch` makes a warning.
    """
    for name, other in bases.items():
        first_name, first = next(iter(bases.items()))
        shared = first.fingerprint.keys() & other.fingerprint.keys()
        if all(first.fingerprint[key] == other.fingerprint[key] for key in shared):
            continue
        message = (
            f"{first_name} was trained on {first.id} ({first.revision[:12]}), {name} on {other.id} "
            f"({other.revision[:12]}), and their weights differ: take erasures of one base, or pass "
            "`allow_mismatch=True`."
        )
        if not allow_mismatch:
            raise BaseMismatchError(message)
        logger.warning(message)


# Nats per token. `pytest -m slow tests/hub/test_verify.py` measures what lies on either side: batches and types below,
# a missing or another adapter above. Rounding to 8 or 4 bits moves some answers further than a missing adapter moves
# others, so quantized models are judged by the mean of all answers.
TOLERANCE = 0.05
QUANTIZED_TOLERANCE = 0.5


def make_probes(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    report: Mapping[str, Any],
    count: int = 16,
) -> list[Probe]:
    """Take the answers to the report's samples that do not tell the erased knowledge, at most `count`, and what the model gives
    to them.

    Raises:
        ValueError: if the samples do not say what the right answers are, as in a report that was published.
    """
    pairs: list[tuple[str, str]] = []
    lengths: list[int] = []
    for sample in report["samples"]:
        if len(pairs) == count:
            break
        if "answer" not in sample:
            raise ValueError(
                "`report` holds samples without `answer`, so it is a published one, and whether an answer tells the "
                "erased knowledge can't be seen: pass the report of `evaluate_erasure`."
            )
        if not sample["erased"].strip() or names_answer(sample["erased"], sample["answer"]):
            continue
        pair = (as_prompt(processing_class, sample["prompt"]), sample["erased"])
        if tokens := _answer_tokens(processing_class, *pair):
            pairs.append(pair)
            lengths.append(tokens)
    likelihoods = log_likelihoods(model, processing_class, pairs, description="Probes")
    return [
        Probe(prompt, answer, likelihood, tokens)
        for (prompt, answer), likelihood, tokens in zip(pairs, likelihoods, lengths, strict=True)
    ]


def check_probes(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
) -> list[float]:
    """Ask the questions again, compare what the model gives to the stored answers, and return each difference in nats per token.

    Of every answer it may be 0.05; of a quantized model the mean over the answers may be 0.5, which tells a missing or
    unrelated adapter, but nothing finer.

    Raises:
        VerificationError: naming the prompts and their differences.
    """
    for probe in probes:
        tokens = _answer_tokens(processing_class, probe.prompt, probe.answer)
        if tokens is None:
            raise VerificationError(
                f"{_short(probe.prompt)} cannot be asked: with its answer it has more than {LONGEST_PROBE} characters or "
                f"{MOST_PROBE_TOKENS} tokens, or either is empty."
            )
        if tokens != probe.tokens:
            raise VerificationError(
                f"The answer to {_short(probe.prompt)} has {tokens} tokens, but {probe.tokens} were published: this is "
                "another tokenizer."
            )
    pairs = [(probe.prompt, probe.answer) for probe in probes]
    likelihoods = log_likelihoods(model, processing_class, pairs, description="Verifying")
    differences = [
        (likelihood - probe.log_likelihood) / probe.tokens
        for likelihood, probe in zip(likelihoods, probes, strict=True)
    ]
    quantized = is_quantized(model)
    tolerance = QUANTIZED_TOLERANCE if quantized else TOLERANCE
    sizes = [abs(difference) for difference in differences]
    judged = [sum(sizes) / len(sizes)] * len(sizes) if quantized and sizes else sizes
    # Not a number is no agreement either.
    beyond = [
        f"{_short(probe.prompt)} by {difference:+.3f}"
        for probe, difference, size in zip(probes, differences, judged, strict=True)
        if not size <= tolerance
    ]
    if beyond:
        raise VerificationError(
            f"The model gives {len(beyond)} of {len(probes)} published answers another likelihood, by more than "
            f"{tolerance} nats per token{' on average' if quantized else ''}: {'; '.join(beyond)}. Is it the published "
            "base in the published revision, and the adapter active?"
        )
    return differences


def _answer_tokens(processing_class: PreTrainedTokenizerBase, prompt: str, answer: str) -> int | None:
    """Tokens of an answer, one across its seam with the prompt included; `None` if it is too long or empty to be asked."""
    if len(prompt) + len(answer) > LONGEST_PROBE:
        return None
    ids, first = tokenize_pair(processing_class, prompt, answer)
    return len(ids) - first if 0 < first < len(ids) <= MOST_PROBE_TOKENS else None


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 160 else "…" + prompt[-160:])
