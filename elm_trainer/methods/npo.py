"""Negative Preference Optimization (arXiv 2404.05868): config and trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from trl import SFTConfig

from ..ops import text_sums
from .base import ErasureTrainer, check_fields, position_nll, retain_term, weighted_batches


@dataclass
class NpoConfig(SFTConfig):
    r"""
    Configuration class for the [`NpoTrainer`].

    This class includes only the parameters that are specific to NPO. For a full list of training arguments, see
    [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        beta (`float`, *optional*, defaults to `0.1`):
            β, the inverse temperature: towards 0 the method becomes gradient ascent, and the larger it is, the sooner a
            text counts as forgotten.
        erase_weight (`float`, *optional*, defaults to `1.0`):
            Weight γ of the erase term. A weight of 0 skips a term's work altogether.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            Weight α of the retain term.
        retain_loss (`str`, *optional*, defaults to `"nll"`):
            `"nll"` of retain text, or `"kl"` to the reference, which is then run on it at every step.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `True`):
            Run the reference over all forget texts once before training and keep one number for each, in place of a
            reference forward in every step. `False` is faster where training visits few of the rows.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `1e-5` instead of `2e-5`, as published for training all weights.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    beta: float = field(default=0.1, metadata={"help": "Inverse temperature of the erase term."})
    erase_weight: float = field(default=1.0, metadata={"help": "Weight of the erase term."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term."})
    retain_loss: str = field(default="nll", metadata={"help": "Retain term.", "choices": ["nll", "kl"]})
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "Run the reference on the forget texts once before training."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, {"above 0": ("beta",)})


def sequence_nll(logits: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """ℓ: negative log-likelihood of each text, summed over its supervised positions, `[texts]`."""
    return text_sums(position_nll(logits, batch), batch["rows"], batch["input_ids"].size(0))


def npo_loss(nll: torch.Tensor, reference_nll: torch.Tensor, beta: float) -> torch.Tensor:
    """Loss of each text, `[texts]`: `(2/β)·log(1 + (π_θ/π_ref)^β) = −(2/β)·log σ(β(ℓ_θ − ℓ_ref))` (arXiv 2404.05868, the
    NPO loss of section 3).

    Args:
        nll (`torch.Tensor`): ℓ_θ of the adapted model, summed over each text, `[texts]`.
        reference_nll (`torch.Tensor`): ℓ_ref of the reference, `[texts]`.
        beta (`float`): β.
    """
    return -2 / beta * F.logsigmoid(beta * (nll - reference_nll))


class NpoTrainer(ErasureTrainer):
    """Trainer for Negative Preference Optimization (NPO): ascent on forget text that slows down as a text is forgotten.

    `Loss = γ·F + α·R` with `F` the mean over texts of [`npo_loss`], and `R` the NLL of retain text or
    `KL(reference ‖ adapted)` on it, the mean over texts of the mean over their positions. At the start `F` is `2·ln 2/β`
    and its gradient that of ascent on the summed NLL.

    Takes the arguments of [`~trl.SFTTrainer`] and raises what [`ErasureTrainer`] raises.
    """

    _name = "NPO"
    _config_class = NpoConfig
    args: NpoConfig

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if self.args.precompute_ref_log_probs and self.args.erase_weight:
            self.data_collator.targets = self.precompute(self._reference_rows, "Computing reference log-probabilities")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = {"erase": self.args.erase_weight, "retain": self.args.retain_weight}
        batches = weighted_batches(inputs, weights)
        compared = ["retain"] if self.args.retain_loss == "kl" else []
        if "target" not in inputs["forget"]:
            compared.append("erase")
        reference = self.reference_positions(model, {term: batches[term] for term in compared if term in batches})
        logits = self.forward_positions(model, batches)
        terms = {}
        if "erase" in logits:
            forget = batches["erase"]
            reference_nll = (
                sequence_nll(reference["erase"], forget) if "erase" in reference else forget["target"]["nll"]
            )
            terms["erase"] = npo_loss(sequence_nll(logits["erase"], forget), reference_nll, self.args.beta).mean()
        if "retain" in logits:
            terms["retain"] = retain_term(logits["retain"], batches["retain"], reference.get("retain"))
        loss = self.weigh(terms, weights)
        return (loss, None) if return_outputs else loss

    def _reference_rows(self, inputs: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
        """ℓ_ref of each forget text, as the collator keeps it."""
        logits = self.reference_positions(self.model, {"forget": inputs["forget"]})["forget"]
        return [{"forget_nll": nll} for nll in sequence_nll(logits, inputs["forget"]).cpu().split(1)]
