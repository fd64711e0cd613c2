"""`adapter_config.json` of somebody else: plain LoRA passes, whatever makes PEFT import, load or decompose does not."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from .errors import UnsafeAdapterError


# What a LoRA adapter is made of. PEFT gives everything else to importers, initialisers that rewrite the base, or
# variants that route between further adapters.
_PLAIN = frozenset(
    (
        "alpha_pattern",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    )
)
_WHY = {
    "auto_mapping": 'imports a library by its name (save the adapter with `task_type="CAUSAL_LM"` to be without)',
    "arrow_config": "routes between further adapters",
    "bias": "overwrites biases of the base, which `unload` does not bring back",
    "corda_config": "reads a pickled cache",
    "eva_config": "decomposes activations of data",
    "kasa_config": "truncates weights of the base",
    "layer_replication": "rebuilds the base with more layers",
    "loftq_config": "quantises weights of the base",
    "lora_ga_config": "reads a pickled cache",
    "megatron_config": "imports a library by its name",
    "megatron_core": "imports a library by its name",
}
# The other values of `init_lora_weights` decompose the base, or rewrite it, when the adapter is loaded.
_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal")
_LARGEST_RANK = 1 << 16


def check_adapter_config(config: Any, path: Path) -> None:
    """Check the contents of an `adapter_config.json`.

    Fields that nobody here knows pass, since PEFT leaves them out with a warning.

    Args:
        config (`Any`): Its contents.
        path (`Path`): Its place, for the error.

    Raises:
        UnsafeAdapterError: naming the field, its value and what it would do.
    """
    if not isinstance(config, dict):
        raise UnsafeAdapterError(f"{path} holds a {type(config).__name__}, not the settings of an adapter.")
    if config.get("peft_type") != "LORA":
        raise UnsafeAdapterError(
            f"{path}: `peft_type` is {config.get('peft_type')!r}. Only LORA can be checked before it is loaded: load "
            "it with `PeftModel.from_pretrained` if you trust it."
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsafeAdapterError(f"{path}: `task_type` is {config['task_type']!r}, but CAUSAL_LM is expected.")
    start = config.get("init_lora_weights", True)
    if not any(start is allowed or start == allowed and isinstance(start, str) for allowed in _HARMLESS_STARTS):
        raise UnsafeAdapterError(
            f"{path}: `init_lora_weights` is {start!r}, which reads or rewrites the base when the adapter is loaded: "
            "save it as plain LoRA, with `path_initial_model_for_weight_conversion` of `save_pretrained`."
        )
    # Those that the installed PEFT knows, and those of other versions that are known to be no plain LoRA.
    defaults = dict.fromkeys(_WHY) | {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for name, default in defaults.items():
        value = config.get(name)
        # The empty ones, and what PEFT writes where nothing was set.
        if name in _PLAIN or not value or value == default:
            continue
        why = _WHY.get(name, "is not part of plain LoRA")
        raise UnsafeAdapterError(f"{path}: `{name}` is {_short(value)}. It {why}: it is not loaded.")
    for name, fits in _TYPES.items():
        if config.get(name) is not None and not fits(config[name]):
            raise UnsafeAdapterError(f"{path}: `{name}` is {_short(config[name])}, which PEFT does not take.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value


def _one_or_list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: fits(value) or (isinstance(value, list) and all(map(fits, value)))


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "alpha_pattern": _pattern(_is_number),
    "base_model_name_or_path": _is_name,
    "ensure_weight_tying": _is_flag,
    "exclude_modules": _one_or_list(_is_name),
    "fan_in_fan_out": _is_flag,
    "layers_pattern": _one_or_list(_is_name),
    "layers_to_transform": _one_or_list(_is_count),
    "lora_alpha": _is_number,
    "lora_bias": _is_flag,
    "lora_dropout": _is_number,
    "modules_to_save": _list_of(_is_name),
    "r": _is_rank,
    "rank_pattern": _pattern(_is_rank),
    "revision": _is_name,
    "target_modules": _one_or_list(_is_name),
    "target_parameters": _list_of(_is_name),
    "trainable_token_indices": lambda value: (
        all(map(_list_of(_is_count), value.values())) if isinstance(value, dict) else _list_of(_is_count)(value)
    ),
    "use_dora": _is_flag,
    "use_rslora": _is_flag,
}
