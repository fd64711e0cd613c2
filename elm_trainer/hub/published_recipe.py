"""The recipe as it goes up: settings that are known to change what is learned, each of its own type."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from types import NoneType
from typing import Any, get_args

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging
from trl import SFTConfig

from ..concept import concept_presets
from ..data.sources import BUILTIN_PAIRS, BUILTIN_SOURCES
from ..data.user_sources import is_hub_id
from ..evaluation.measures import INSIDE, MEASURES
from .info import BaseModel


logger = logging.get_logger(__name__)
LOCAL_FILE = "(local file)"
# The seed, and fields of TRL's config whose default some method changes.
ALWAYS = ("seed", "learning_rate", "lr_scheduler_type", "max_grad_norm", "max_steps", "per_device_train_batch_size")

# Settings of this machine, its trackers and its Hub account: they do not change what is learned.
_OF_THE_MACHINE = re.compile(
    r"(hub_|push_to_hub|logging_|log_level|log_on_|save_|trackio_|ddp_|fsdp|deepspeed|accelerator_config|parallelism_config).*"
    r"|report_to|run_name|project|disable_tqdm|local_rank|resume_from_checkpoint|overwrite.*|adapter|reference|debug"
    r"|targets_dir|.*_dir|(.*_)?(token|secret|password|key)"
)
_MODULES = r"[A-Za-z_][\w.]*"
_LARGEST = 1 << 53

# What a value must be to go up. Each gives the public value, or None where it is something else.
Public = Callable[[Any], Any]


def _number(value: Any) -> Any:
    # Larger ones are settings of nothing, but could be somebody's number.
    fits = type(value) in (int, float) and math.isfinite(value) and abs(value) < _LARGEST
    return value if fits else None


def _number_or_flag(value: Any) -> Any:
    return value if isinstance(value, bool) else _number(value)


def _one_of(*choices: str) -> Public:
    return lambda value: str(value.value if isinstance(value, Enum) else value) if value in choices else None


def _matching(pattern: str) -> Public:
    return lambda value: value if isinstance(value, str) and re.fullmatch(pattern, value) else None


def _or_list(public: Public) -> Public:
    def of_all(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return public(value)
        parts = [public(part) for part in value]
        return None if None in parts else parts

    return of_all


def _mapping(known: Mapping[str, Public]) -> Public:
    """Of a mapping the entries that are known."""

    def of_entries(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return None
        public = {key: known[key](part) for key, part in value.items() if key in known}
        return {key: part for key, part in public.items() if part is not None} or None

    return of_entries


def _source(value: Any) -> Any:
    """What was read: built in, or on the Hub; anything else is a file here."""
    if not isinstance(value, str):
        return None
    built_in = (*BUILTIN_SOURCES, *BUILTIN_PAIRS, *concept_presets(), "none")
    return value if value in built_in or is_hub_id(value) else LOCAL_FILE


_DTYPE = _one_of("auto", "float32", "bfloat16", "float16", "float64")
_ATTENTION = _one_of("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_SCHEDULER = "num_cycles power lr_end min_lr min_lr_rate min_lr_ratio num_decay_steps num_stable_steps".split()
_LIGER = "rope swiglu geglu rms_norm layer_norm cross_entropy fused_linear_cross_entropy".split()
# Settings of `examples/erase.py` and of the methods that are numbers or flags.
_NUMBERS = (
    "dataset_size synthetic_size lora_rank lora_alpha lora_dropout evaluate questions dev_every dev_stop "
    "eta eta_end tau top_k plausibility fact_share log_tokens log_strength contrast_rows contrast_damping erase_weight "
    "retain_weight retain_focus consistency_weight contexts_per_sample expert_steps novice_steps teacher_learning_rate "
    "teacher_rank teacher_batch_size precompute_targets precompute_ref_log_probs alpha beta delta faithful layer layers "
    "steering_coefficient steering_scale adaptive relu reinforced_steps"
).split()
_KNOWN: Mapping[str, Public] = {
    **dict.fromkeys(_NUMBERS, _or_list(_number_or_flag)),
    **dict.fromkeys(("forget", "retain", "synthetic", "bank", "anchors", "chat_template_path"), _or_list(_source)),
    "dtype": _DTYPE,
    "attn_implementation": _ATTENTION,
    "matmul_precision": _one_of("highest", "high", "medium"),
    "lora_layers": _matching(r"\d+(-\d+)?"),
    "lora_targets": _matching(rf"all-linear|{_MODULES}(, ?{_MODULES})*"),
    "target_module": _matching(_MODULES),
    "measures": _or_list(_one_of(*MEASURES, INSIDE)),
    "preset": _one_of("paper", "released"),
    "novice": _one_of("contexts", "counterfactual"),
    "retain_loss": _one_of("kl", "argmax", "log", "nll"),
    # Fields of TRL's config that hold text or further settings.
    "lr_scheduler_type": _one_of(*SchedulerType),
    "lr_scheduler_kwargs": _mapping(dict.fromkeys(_SCHEDULER, _number_or_flag)),
    "optim": _one_of(*OptimizerNames),
    "optim_args": _matching(r"[a-z]\w{0,20}=-?[\d.e-]{1,20}(,\s*[a-z]\w{0,20}=-?[\d.e-]{1,20})*"),
    "optim_target_modules": _or_list(_matching(rf"all-linear|{_MODULES}")),
    "truncation_mode": _one_of("keep_start", "keep_end"),
    "packing_strategy": _one_of("bfd", "bfd_split", "wrapped"),
    "loss_type": _one_of("nll", "chunked_nll", "dft"),
    "train_sampling_strategy": _one_of("random", "sequential", "group_by_length"),
    "pad_to_multiple_of": lambda value: value if value == "auto" else _number(value),
    "eval_strategy": _one_of("no", "steps", "epoch"),
    "include_num_input_tokens_seen": lambda value: (
        _one_of("no", "all", "non_padding")(value) or _number_or_flag(value)
    ),
    "metric_for_best_model": _one_of("loss", "eval_loss"),
    "gradient_checkpointing_kwargs": _mapping({"use_reentrant": _number_or_flag}),
    "activation_checkpointing_kwargs": _mapping({"use_reentrant": _number_or_flag}),
    "liger_kernel_config": _mapping(dict.fromkeys(_LIGER, _number_or_flag)),
    "model_init_kwargs": _mapping({"dtype": _DTYPE, "attn_implementation": _ATTENTION}),
    "dataset_kwargs": _mapping({"skip_prepare_dataset": _number_or_flag}),
}


def published_recipe(recipe: Mapping[str, Any], base_model: BaseModel, concepts: Sequence[str]) -> dict[str, Any]:
    """The settings of a training as they go up.

    Fields at TRL's default and settings of the machine are left out. So are fields that nobody here knows, and values of
    another type than their field's, both with a warning that names them: what a stranger reads is what is listed here.
    Numbers and flags that the config of a method of one's own declares are known once that method is imported.

    Args:
        recipe (`Mapping`): Settings of the training.
        base_model ([`BaseModel`]): Stands in for the model that was trained on.
        concepts (`Sequence[str]`): What was erased, which names the output folder.
    """
    known = {**_declared(), **_KNOWN, "concepts": _or_list(_one_of(*concepts))}
    defaults = {field.name: _default(field) for field in fields(SFTConfig) if field.name not in ALWAYS}
    replaced = {"model", "model_revision", "gguf_file", "output_dir"}
    public: dict[str, Any] = {}
    left_out = []
    for name, value in recipe.items():
        of_the_machine = name in replaced or _OF_THE_MACHINE.fullmatch(name)
        if of_the_machine or value is None or (name in defaults and value == defaults[name]):
            continue
        found = known[name](value) if name in known else None
        if found is None or (isinstance(value, Mapping) and len(found) < len(value)):
            left_out.append(name)
        if found is not None:
            public[name] = found
    if left_out:
        logger.warning(
            f"Settings of the recipe that are not published, being unknown or of another type than their own: "
            f"{', '.join(sorted(left_out))}."
        )
    public |= {"model": base_model.id, "model_revision": base_model.revision}
    if base_model.gguf_file is not None:
        public["gguf_file"] = base_model.gguf_file
    return public | {"output_dir": "outputs/" + "-".join(map(_file_name, concepts))}


def _declared() -> dict[str, Public]:
    """The numbers and flags among the fields of TRL's config and of all configs derived from it."""
    configs: list[type[SFTConfig]] = [SFTConfig]
    found: dict[str, Public] = {}
    for config in configs:
        configs += config.__subclasses__()
        for field in fields(config):
            types = set(get_args(field.type)) or {field.type}
            if types <= {int, float, bool, NoneType}:
                found[field.name] = _number_or_flag
    return found


def _default(field: Field[Any]) -> Any:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return default.value if isinstance(default, Enum) else default


def _file_name(concept: str) -> str:
    return re.sub(r"[^\w-]+", "-", concept).strip("-")
