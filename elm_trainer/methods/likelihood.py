"""GradDiff, NPO and SimNPO: methods that read of a text only how likely it is. Their configs, losses and trainers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.target_store import Field, TargetLayout
from ..objectives import text_means, text_sums
from .base import ErasureTrainer
from .config import ErasureConfig
from .forward import batch_mean, nll_reading
from .targets import TargetPlan, precompute_targets


@dataclass
class GradDiffConfig(ErasureConfig):
    r"""
    Configuration class for the [`GradDiffTrainer`]: its parameters beside those of [`~trl.SFTConfig`].

    Parameters:
        erase_weight (`float`, *optional*, defaults to `1.0`): Weight γ of the erase term. A weight of 0 skips a term's
            work altogether.
        retain_weight (`float`, *optional*, defaults to `1.0`): Weight α of the retain term; with 0 the method is
            gradient ascent.
        retain_loss (`str`, *optional*, defaults to `"nll"`): `"nll"` of retain text, or `"kl"` to the reference, which
            is then run on it at every step.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `1e-5` instead of `2e-5`, as published for training all weights.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    erase_weight: float = field(default=1.0, metadata={"help": "Weight of the erase term."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term."})
    retain_loss: str = field(default="nll", metadata={"help": "Retain term.", "choices": ["nll", "kl"]})


class GradDiffTrainer(ErasureTrainer):
    """Trainer for gradient difference: ascent on forget text, descent on retain text.

    `Loss = γ·F + α·R` with `F = −NLL(forget)` (TOFU, arXiv 2401.06121, section 3.3, after arXiv 2203.12817) and `R` the
    NLL of retain text or `KL(reference ‖ adapted)` on it, each the mean over texts of the mean over their positions. `F`
    has no lower bound: stop early.

    Takes the arguments of [`~trl.SFTTrainer`] and raises what [`ErasureTrainer`] raises.
    """

    _name = "GradDiff"
    _config_class = GradDiffConfig
    args: GradDiffConfig

    def erase_term(self, model, nll, batch):
        return -batch_mean(nll, batch)


@dataclass
class NpoConfig(ErasureConfig):
    r"""
    Configuration class for the [`NpoTrainer`]: its parameters beside those of [`~trl.SFTConfig`].

    Parameters:
        beta (`float`, *optional*, defaults to `0.1`): β, the inverse temperature: towards 0 the method becomes
            gradient ascent, and the larger it is, the sooner a text counts as forgotten.
        erase_weight (`float`, *optional*, defaults to `1.0`): Weight γ of the erase term. A weight of 0 skips a term's
            work altogether.
        retain_weight (`float`, *optional*, defaults to `1.0`): Weight α of the retain term.
        retain_loss (`str`, *optional*, defaults to `"nll"`): `"nll"` of retain text, or `"kl"` to the reference, which
            is then run on it at every step.
        precompute_ref_log_probs (`bool`, *optional*): Run the reference over all forget texts once before training and
            keep one number for each on disk, for every run with the same model and data, in place of a reference
            forward in every step. By default this is done where training visits every row at least once.
        targets_dir (`str`, *optional*): Folder in which these numbers are kept, each set of them under a name that
            says all they depend on. All processes must see it. Defaults to `elm_targets` in the cache of `datasets`.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `1e-5` instead of `2e-5`, as published for training all weights.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    beta: float = field(default=0.1, metadata={"help": "Inverse temperature of the erase term."})
    erase_weight: float = field(default=1.0, metadata={"help": "Weight of the erase term."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term."})
    retain_loss: str = field(default="nll", metadata={"help": "Retain term.", "choices": ["nll", "kl"]})
    precompute_ref_log_probs: bool | None = field(
        default=None, metadata={"help": "Run the reference on the forget texts once before training."}
    )
    targets_dir: str | None = field(default=None, metadata={"help": "Folder in which its numbers are kept."})

    _rules = {"above 0": ("beta",)}


def sequence_nll(losses: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """ℓ: negative log-likelihood of each text, `[texts]`, from that of its positions, `[positions]`."""
    return text_sums(losses, batch["rows"], batch["input_ids"].size(0))


def npo_loss(nll: torch.Tensor, reference_nll: torch.Tensor, beta: float) -> torch.Tensor:
    """Loss of each text, `[texts]`: `(2/β)·log(1 + (π_θ/π_ref)^β) = −(2/β)·log σ(β(ℓ_θ − ℓ_ref))` (arXiv 2404.05868, the
    NPO loss of section 3).

    Args:
        nll: ℓ_θ of the adapted model, summed over each text, `[texts]`.
        reference_nll: ℓ_ref of the reference, `[texts]`.
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

    def set_up(self):
        kept = {"forget_nll": Field("floats", per="text")} if self.args.erase_weight else {}

        def compute(inputs: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
            return [{"forget_nll": nll} for nll in self.reference_nll(self.model, inputs["forget"]).cpu().split(1)]

        plan = TargetPlan(
            switch="precompute_ref_log_probs",
            layout=TargetLayout(kept, self.model.config.get_text_config().vocab_size),
            settings={"method": "NPO"},
            columns=["forget_ids"],
            compute=compute,
            description="Computing reference log-probabilities",
        )
        if stored := precompute_targets(self, plan):
            self.data_collator.targets = stored

    def packed_together(self):
        live = self.args.erase_weight and getattr(self.data_collator, "targets", None) is None
        return [*super().packed_together(), *[("forget",)] * bool(live)]

    def erase_term(self, model, nll, batch):
        reference = batch["target"]["nll"] if "target" in batch else self.reference_nll(model, batch)
        return npo_loss(sequence_nll(nll, batch), reference, self.args.beta).mean()

    def reference_nll(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """ℓ_ref of each text, `[texts]`."""
        losses = self.reference_positions(model, {"forget": batch}, {"forget": nll_reading(batch)})["forget"]
        return sequence_nll(losses, batch)


@dataclass
class SimNpoConfig(ErasureConfig):
    r"""
    Configuration class for the [`SimNpoTrainer`]: its parameters beside those of [`~trl.SFTConfig`].

    Parameters:
        beta (`float`, *optional*, defaults to `4.5`): β, the inverse temperature. The default and that of
            `erase_weight` are the released ones for TOFU's forget10.
        delta (`float`, *optional*, defaults to `0.0`): Margin δ in nats per token below which a text counts as
            remembered (the official code's `gamma`).
        erase_weight (`float`, *optional*, defaults to `0.125`): Weight γ of the erase term. A weight of 0 skips a
            term's work altogether.
        retain_weight (`float`, *optional*, defaults to `1.0`): Weight α of the retain term.
        retain_loss (`str`, *optional*, defaults to `"nll"`): `"nll"` of retain text, or `"kl"` to the reference, which
            is then run on it at every step.

    The defaults suit texts that the model knows by heart, as in TOFU. The pull on a text is `2·σ(−β(ℓ/|y| − δ))` times
    that of ascent, next to nothing where a token costs more than a nat to begin with. For such texts take the authors'
    setting for WMDP, `beta=0.1, erase_weight=1.0`, or a `delta` near what a token costs.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `1e-5` instead of `2e-5`, as published for training all weights.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    beta: float = field(default=4.5, metadata={"help": "Inverse temperature of the erase term."})
    delta: float = field(default=0.0, metadata={"help": "Margin of the erase term, per token."})
    erase_weight: float = field(default=0.125, metadata={"help": "Weight of the erase term."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term."})
    retain_loss: str = field(default="nll", metadata={"help": "Retain term.", "choices": ["nll", "kl"]})

    _rules = {"above 0": ("beta",), "at least 0": ("delta",)}


def simnpo_loss(nll: torch.Tensor, beta: float, delta: float) -> torch.Tensor:
    """Loss of each text, `[texts]`: `−(2/β)·log σ(β(ℓ/|y| − δ))` (arXiv 2410.07163, the SimNPO loss; its official code).

    The paper writes the margin outside the bracket, as `γ = β·δ`; the official code inside, as here.

    Args:
        nll: ℓ/|y|, mean negative log-likelihood over each text's positions, `[texts]`.
    """
    return -2 / beta * F.logsigmoid(beta * (nll - delta))


class SimNpoTrainer(ErasureTrainer):
    """Trainer for Simple Negative Preference Optimization (SimNPO): NPO by the mean per token, without a reference.

    `Loss = γ·F + α·R` with `F` the mean over texts of [`simnpo_loss`], and `R` the NLL of retain text or
    `KL(reference ‖ adapted)` on it, the mean over texts of the mean over their positions.

    Takes the arguments of [`~trl.SFTTrainer`] and raises what [`ErasureTrainer`] raises.
    """

    _name = "SimNPO"
    _config_class = SimNpoConfig
    args: SimNpoConfig

    def erase_term(self, model, nll, batch):
        mean_nll = text_means(nll, batch["rows"], batch["input_ids"].size(0))
        return simnpo_loss(mean_nll, self.args.beta, self.args.delta).mean()
