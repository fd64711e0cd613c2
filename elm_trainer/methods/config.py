"""`ErasureConfig`, from which the configs of all methods derive, the checks of its options, and what a run notes of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging
from trl import SFTConfig

from ..checks import check_numbers
from ..distributed import multiplies_in_bfloat16


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


_OWN_LOSS = "the loss is the method's own"
_OWN_TEXTS = "the dataset has the columns of `build_erasure_dataset`, and every token of a text counts"
_OWN_LAYOUT = "texts are packed without padding in every step"
_NO_LOGITS = "a step makes no logits of whole texts that a metric could read; measure with `ErasureEvaluationCallback`"
# Options of `SFTConfig` that an erasure cannot follow, and why.
REFUSED_OPTIONS = {
    "assistant_only_loss": _OWN_TEXTS,
    "completion_only_loss": _OWN_TEXTS,
    "dataset_text_field": _OWN_TEXTS,
    "dataset_kwargs": _OWN_TEXTS,
    "chat_template_path": "texts are rendered by `build_erasure_dataset`: set the tokenizer's `chat_template` before",
    "truncation_mode": "texts are cut at their end",
    "loss_type": _OWN_LOSS,
    "label_smoothing_factor": _OWN_LOSS,
    "router_aux_loss_coef": _OWN_LOSS,
    "packing": _OWN_LAYOUT,
    "eval_packing": _OWN_LAYOUT,
    "padding_free": _OWN_LAYOUT,
    "parallelism_config": "texts are not split over devices",
    "include_for_metrics": _NO_LOGITS,
    "batch_eval_metrics": _NO_LOGITS,
    "label_names": _NO_LOGITS,
}
# Arguments of `SFTTrainer` likewise.
REFUSED_ARGUMENTS = {
    "compute_loss_func": _OWN_LOSS,
    "compute_metrics": _NO_LOGITS,
    "preprocess_logits_for_metrics": _NO_LOGITS,
    "formatting_func": _OWN_TEXTS,
}
# Options that change nothing here.
WITHOUT_EFFECT = {
    "packing_strategy": _OWN_LAYOUT,
    "average_tokens_across_devices": "a loss is a mean over texts, not over tokens",
    "eval_accumulation_steps": "an evaluation keeps no logits",
    "eval_do_concat_batches": "an evaluation keeps no logits",
    "eval_use_gather_object": "an evaluation keeps no logits",
}


@dataclass
class ErasureConfig(SFTConfig):
    """[`~trl.SFTConfig`] as the methods' configs extend it: `bf16` defaults to whether the device multiplies in bfloat16, as TRL's
    default of `True` is an error on some devices and takes four times as long as float32 on others. `bf16_full_eval` may be
    `None`, which means as `bf16`.

    Its numbers must be numbers, whole where they count something, and finite, but for `max_grad_norm`. Of a method's own fields,
    those that name `choices` in their metadata must be one of them, and those named `<term>_weight` be at least 0 and not all 0.
    `_rules` of a class and of those above it hold names of fields by what they must be, such as `"at least 0"`. All else raises
    `ValueError`. A config that fills in defaults does so before it calls `super().__post_init__()`.
    """

    # Without an annotation, with which it would be one of the fields that dataclasses and parsers list.
    _rules = dict[str, tuple[str, ...]]()

    bf16_full_eval: bool | None = field(
        default=False, metadata={"help": "Evaluate in bfloat16 alone, without float32 weights; null for as `bf16`."}
    )

    def __post_init__(self):
        if self.bf16 is None and not self.fp16:
            if self.use_cpu:
                self.bf16 = multiplies_in_bfloat16(torch.device("cpu"))
            elif not (is_torch_bf16_gpu_available() or is_torch_xla_available()):
                logger.warning(
                    "`bf16` is left out, and no accelerator here computes in bfloat16: training in float32."
                )
                self.bf16 = False
        if self.bf16_full_eval is None:
            self.bf16_full_eval = not self.fp16 if self.bf16 is None else self.bf16
        # TRL sets its default by the older name, of which transformers would warn.
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}") is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        super().__post_init__()
        own = [each for each in fields(self) if each.name not in SFTConfig.__dataclass_fields__]
        weights = [each.name for each in own if each.name.endswith("_weight")]
        rules = [rule for cls in type(self).__mro__ for rule in vars(cls).get("_rules", {}).items()]
        check_numbers(self, [*rules, *_COMMON_RULES.items(), ("at least 0", weights)])
        for each in own:
            choices, value = each.metadata.get("choices"), getattr(self, each.name)
            if choices and value not in choices:
                raise ValueError(f"`{each.name}` is {value!r}: use one of {', '.join(choices)}.")
        if weights and not any(getattr(self, name) for name in weights):
            raise ValueError(f"All of {', '.join(f'`{name}`' for name in weights)} are 0: raise one of them.")


def check_options(args: SFTConfig, arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what `SFTTrainer` would follow and an erasure would not, in a config or a trainer's further arguments."""
    if args.push_to_hub and args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"`hub_strategy` is {args.hub_strategy.value!r}, which uploads checkpoints as they are, without report and "
            "checks: use 'end', and `push_to_hub()` after the evaluation."
        )
    for name, why in REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"`{name}` is given, but {why}: leave it out.")
    for name, why in REFUSED_OPTIONS.items():
        if (value := getattr(args, name)) != _default(name):
            raise ValueError(f"`{name}` is {value!r}, but {why}: leave it out.")
    for name, why in WITHOUT_EFFECT.items():
        if (value := getattr(args, name)) != _default(name):
            logger.warning(f"`{name}` has no effect, though it is {value!r}: {why}.")
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError(
            "`activation_offloading` is True, but there is no accelerator to bring them from: leave it out."
        )
    for name in ("split_batches", "dispatch_batches"):
        if args.world_size > 1 and getattr(args.accelerator_config, name, None):
            raise ValueError(
                f"`accelerator_config` has `{name}=True`, but a batch holds texts of several lengths, which cannot be cut for "
                "the processes: leave it out."
            )


def _default(name: str) -> Any:
    field = SFTConfig.__dataclass_fields__[name]
    return field.default if field.default_factory is MISSING else field.default_factory()


def fixed_settings(args: SFTConfig, train_dataset: Dataset | None) -> dict[str, str]:
    """What must not change between a run and its resumption: the data, the settings of the method, and those that the
    checkpoint's optimizer, schedule and order of rows would keep all the same. Tokenized rows are given as a SHA-256.
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
