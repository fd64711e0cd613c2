"""Simple Negative Preference Optimization (arXiv 2410.07163): config and trainer."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..ops import text_means
from .base import ErasureTrainer
from .config import ErasureConfig, check_fields


@dataclass
class SimNpoConfig(ErasureConfig):
    r"""
    Configuration class for the [`SimNpoTrainer`].

    This class includes only the parameters that are specific to SimNPO. For a full list of training arguments, see
    [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

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

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, {"above 0": ("beta",), "at least 0": ("delta",)})


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
