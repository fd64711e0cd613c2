"""Specificity: perplexity on retain text, and how far the adapted distribution is from the reference's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedTokenizerBase

from ..data.collator import ElmDataCollator
from .fluency import position_logits
from .pair import SIDES, ModelPair


@dataclass(frozen=True)
class Retention:
    """Sums over each text's tokens, in nats: negative log-likelihoods of both models and `KL(reference ‖ adapted)`."""

    reference_nll: list[float]
    adapted_nll: list[float]
    kl: list[float]
    tokens: list[int]


@torch.inference_mode()
def retention(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    batch_size: int = 8,
) -> Retention:
    """Compare the erased model with its reference, token by token, on retain text.

    Args:
        pair ([`ModelPair`]): Both models.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizer.
        texts (`Sequence[str]`): Retain texts that training did not see.
        max_length (`int`, *optional*, defaults to `64`): Tokens of a text that are read.
        batch_size (`int`, *optional*, defaults to `8`): Texts per batch.
    """
    collator = ElmDataCollator(processing_class)
    sums: list[list[float]] = [[], [], []]
    tokens: list[int] = []
    for start in range(0, len(texts), batch_size):
        rows = [
            (processing_class(text, truncation=True, max_length=max_length)["input_ids"], 0)
            for text in texts[start : start + batch_size]
        ]
        padded = collator.pad(rows)
        labels = padded["labels"][padded["rows"], padded["columns"] + 1]
        log_probs = {}
        for side in SIDES:
            with pair.use(side) as model:
                logits = position_logits(model, send_to_device(padded, model.device))
            log_probs[side] = logits.float().log_softmax(-1)
        reference = log_probs["reference"]
        adapted = log_probs["erased"].to(reference.device)  # two full models may lie on two devices
        chosen = labels.to(reference.device)[:, None]
        values = (
            -reference.gather(-1, chosen)[:, 0],
            -adapted.gather(-1, chosen)[:, 0],
            (reference.exp() * (reference - adapted)).sum(-1),
        )
        place = padded["rows"].to(reference.device)
        for total, value in zip(sums, values, strict=True):
            total += value.new_zeros(len(rows)).index_add(0, place, value).tolist()
        tokens += torch.bincount(padded["rows"], minlength=len(rows)).tolist()
    return Retention(sums[0], sums[1], sums[2], tokens)
