"""Questions of the report, asked again: a loaded model must give the published answers their published likelihood."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import names_answer
from ..data.tokens import tokenize_pair
from ..evaluation.fluency import as_prompt
from ..evaluation.likelihood import log_likelihoods
from ..fingerprint import is_quantised
from .errors import VerificationError
from .info import Probe
from .untrusted import LONGEST_PROBE, MOST_PROBE_TOKENS


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
    """Take the answers to the report's samples that do not tell the erased knowledge, and what the model gives to them.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): Erased model, best in float32.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        report (`Mapping`): Local report of [`evaluate_erasure`], whose samples hold the right answers.
        count (`int`, *optional*, defaults to `16`): Most probes to make.

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
    tolerance: float | None = None,
) -> list[float]:
    """Ask the questions again, and compare what the model gives to the stored answers.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): Model that was loaded.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        probes (`Sequence[Probe]`): What [`make_probes`] made of the erased model.
        tolerance (`float`, *optional*): Largest difference that passes, in nats per token: of every answer, by default
            0.05; of a quantized model the mean over the answers, by default 0.5, which tells a missing or unrelated
            adapter, but nothing finer.

    Returns:
        `list[float]`: difference of each probe, in nats per token.

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
    quantized = is_quantised(model)
    if tolerance is None:
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
