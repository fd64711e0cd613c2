"""Specificity: perplexity on retain text, and how far the adapted distribution is from the reference's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..data.collator import ElmDataCollator
from .fluency import position_logits


@dataclass(frozen=True)
class Retention:
    """Sums over each text's tokens, in nats: negative log-likelihoods of both models and `KL(reference ‖ adapted)`."""

    reference_nll: list[float]
    adapted_nll: list[float]
    kl: list[float]
    tokens: list[int]


@torch.inference_mode()
def retention(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    batch_size: int = 8,
) -> Retention:
    """Compare the adapted model with its reference, token by token, on retain text.

    Args:
        model (`PeftModel`): Adapted model; the reference is the same with the adapter disabled.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        texts (`Sequence[str]`): Retain texts that training did not see.
        max_length (`int`, *optional*, defaults to `64`): Tokens of a text that are read.
        batch_size (`int`, *optional*, defaults to `8`): Texts per batch.
    """
    collator = ElmDataCollator(processing_class)
    sums: list[list[float]] = [[], [], []]
    tokens: list[int] = []
    training = model.training
    model.eval()
    for start in range(0, len(texts), batch_size):
        rows = [
            (processing_class(text, truncation=True, max_length=max_length)["input_ids"], 0)
            for text in texts[start : start + batch_size]
        ]
        batch = send_to_device(collator.pad(rows), model.device)
        labels = batch["labels"][batch["rows"], batch["columns"] + 1]
        adapted = position_logits(model, batch).float().log_softmax(-1)
        with model.disable_adapter():
            reference = position_logits(model, batch).float().log_softmax(-1)
        values = (
            -reference.gather(-1, labels[:, None])[:, 0],
            -adapted.gather(-1, labels[:, None])[:, 0],
            (reference.exp() * (reference - adapted)).sum(-1),
        )
        for total, value in zip(sums, values, strict=True):
            total += value.new_zeros(len(rows)).index_add(0, batch["rows"], value).tolist()
        tokens += torch.bincount(batch["rows"], minlength=len(rows)).tolist()
    model.train(training)
    return Retention(sums[0], sums[1], sums[2], tokens)
