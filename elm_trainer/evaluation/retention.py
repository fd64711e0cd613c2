"""Specificity: perplexity on retain text, and how far the adapted distribution is from the reference's."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedTokenizerBase

from ..data.collator import ElmDataCollator
from ..data.tokens import tokenize
from .fluency import position_logits
from .pair import SIDES, ModelPair
from .sharing import run_batches


@dataclass(frozen=True)
class Retention:
    """Sums over each text's tokens, in nats: negative log-likelihoods of both models and `KL(reference ‖ adapted)`."""

    reference_nll: list[float]
    adapted_nll: list[float]
    kl: list[float]
    tokens: list[int]


@torch.no_grad()
def retention(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    batch_size: int = 8,
    over_ranks: bool = False,
) -> Retention:
    """Compare the erased model with its reference, token by token, on retain text.

    Args:
        pair ([`ModelPair`]): Both models.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizer.
        texts (`Sequence[str]`): Retain texts that training did not see.
        max_length (`int`, *optional*, defaults to `64`): Tokens of a text that are read.
        batch_size (`int`, *optional*, defaults to `8`): Texts per batch.
        over_ranks (`bool`, *optional*, defaults to `False`): Whether the processes of a launch share the work; then all
            of them must call this.
    """
    collator = ElmDataCollator(processing_class)

    def run(batch: Sequence[str]) -> list[list[float]]:
        rows = [(text.ids[:max_length], 0) for text in tokenize(processing_class, batch)]
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
        sums = [value.new_zeros(len(rows)).index_add(0, place, value).tolist() for value in values]
        return [*sums, torch.bincount(padded["rows"], minlength=len(rows)).tolist()]

    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    found = run_batches(run, batches, *pair.models, over_ranks=over_ranks)
    columns = [list(chain(*column)) for column in zip(*found, strict=True)] or [[], [], [], []]
    return Retention(columns[0], columns[1], columns[2], [int(count) for count in columns[3]])
