"""`ErasureConfig`, from which the configs of all methods derive, the checks of their fields, and what a run notes of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from datasets import Dataset
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging
from trl import SFTConfig

from ..checks import check_numbers


logger = logging.get_logger(__name__)
# Settings of the `Trainer` that a resumed run takes from its checkpoint.
KEPT = (
    "learning_rate", "lr_scheduler_type", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed",
    "data_seed",
)  # fmt: skip
# Settings of a method that say where its targets are made, which changes none of them.
_PLACES = ("precompute_targets", "precompute_ref_log_probs", "targets_dir")
# `SFTConfig` accepts other values of these, but no training can work with them.
_COMMON_RULES = {
    "at least 0": ("learning_rate", "num_train_epochs", "seed"),
    "at least 1": ("per_device_train_batch_size", "gradient_accumulation_steps", "pad_to_multiple_of"),
    "at least 2": ("max_length",),
}


@dataclass
class ErasureConfig(SFTConfig):
    """[`~trl.SFTConfig`] as the methods' configs extend it: on a machine whose accelerator cannot compute in bfloat16, or
    without one, `bf16` defaults to `False`, where TRL's default of `True` is an error.
    """

    def __post_init__(self):
        if self.bf16 is None and not (
            self.fp16 or self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
        ):
            logger.warning("`bf16` is left out, and no accelerator here computes in bfloat16: training in float32.")
            self.bf16 = False
        # TRL sets its default by the older name, of which transformers would warn.
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}") is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        super().__post_init__()


def check_fields(config: SFTConfig, rules: Mapping[str, Sequence[str]]) -> None:
    """Raise `ValueError` for a value that a method cannot work with.

    Args:
        config: Config of a method. Its numbers must be numbers, whole where they count something, and finite, but for
            `max_grad_norm`. Of its own fields, those that name `choices` in their metadata must be one of them, and
            those named `<term>_weight` be at least 0 and not all 0.
        rules: Names of fields by what they must be, such as `"at least 0"`.
    """
    own = [field for field in fields(config) if field.name not in SFTConfig.__dataclass_fields__]
    weights = [field.name for field in own if field.name.endswith("_weight")]
    check_numbers(config, [*rules.items(), *_COMMON_RULES.items(), ("at least 0", weights)])
    for field in own:
        choices, value = field.metadata.get("choices"), getattr(config, field.name)
        if choices and value not in choices:
            raise ValueError(f"`{field.name}` is {value!r}: use one of {', '.join(choices)}.")
    if weights and not any(getattr(config, name) for name in weights):
        raise ValueError(f"All of {', '.join(f'`{name}`' for name in weights)} are 0: raise one of them.")


def fixed_settings(args: SFTConfig, train_dataset: Dataset | None) -> dict[str, str]:
    """What must not change between a run and its resumption: the data, the settings of the method, and those that the
    checkpoint's optimizer, schedule and order of rows would keep all the same.

    Args:
        args: Config of a method.
        train_dataset: Tokenized rows, which are given as a SHA-256.
    """
    own = set(type(args).__dataclass_fields__) - set(SFTConfig.__dataclass_fields__) - set(_PLACES) | set(KEPT)
    settings = {name: repr(getattr(args, name)) for name in sorted(own)}
    digest = hashlib.sha256()
    if train_dataset is not None:
        for column in ("forget_ids", "retain_ids", "synthetic_ids"):
            for ids in train_dataset[column]:
                digest.update(json.dumps(ids).encode())
    return settings | {"train_dataset": digest.hexdigest()}


def recipe(args: SFTConfig) -> dict[str, Any]:
    """Every field of a config, those at their defaults too, as JSON holds it; tokens are left out by transformers."""
    return json.loads(json.dumps(args.to_dict(), default=str))
