"""A custom method in one file: maximum entropy on forget text (arXiv 2410.08109), KL to the reference on retain text."""

import math
from dataclasses import dataclass, field

import torch

from elm_trainer.head import STATES, Plan
from elm_trainer.methods.base import ErasureTrainer
from elm_trainer.methods.config import ErasureConfig
from elm_trainer.methods.forward import batch_mean, kl_reading, weighted_batches


@dataclass
class MaxEntropyConfig(ErasureConfig):
    r"""
    Configuration class for the [`MaxEntropyTrainer`].

    Parameters:
        erase_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the erase term.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the retain term.
    """

    erase_weight: float = field(default=0.1, metadata={"help": "Weight of the erase term."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term."})


def kl_to_uniform(logits: torch.Tensor, where: slice) -> torch.Tensor:
    """`KL(adapted ‖ uniform) = log |V| − H(adapted)` per position, `[positions]`, from logits `[positions, vocab]`."""
    log_probs = logits.float().log_softmax(-1)
    return math.log(logits.size(-1)) + (log_probs.exp() * log_probs).sum(-1)


class MaxEntropyTrainer(ErasureTrainer):
    """The model is to know nothing about what comes next in forget text, and to continue retain text as before."""

    _name = "MaxEntropy"
    _config_class = MaxEntropyConfig

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = {"erase": self.args.erase_weight, "retain": self.args.retain_weight}
        batches = weighted_batches(inputs, weights)
        # What the head reads is a chunk of positions at a time, so that no step holds the logits of all of them.
        retain = {term: batch for term, batch in batches.items() if term == "retain"}
        reference = self.reference_positions(model, retain, {"retain": STATES})
        readings = {"erase": kl_to_uniform} | {term: Plan(kl_reading, [states]) for term, states in reference.items()}
        values = self.forward_positions(model, batches, readings)
        terms = {term: batch_mean(value, batches[term]) for term, value in values.items()}
        loss = self.weigh(terms, weights)
        return (loss, None) if return_outputs else loss
