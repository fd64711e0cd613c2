"""Gradient difference (arXiv 2203.12817, 2401.06121): config and trainer."""

from dataclasses import dataclass, field

from .base import ErasureTrainer
from .config import ErasureConfig, check_fields
from .forward import batch_mean


@dataclass
class GradDiffConfig(ErasureConfig):
    r"""
    Configuration class for the [`GradDiffTrainer`].

    This class includes only the parameters that are specific to gradient difference. For a full list of training
    arguments, see [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

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

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, {})


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
