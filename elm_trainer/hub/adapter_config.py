"""A stranger's `adapter_config.json`: plain LoRA is accepted; patterns are accepted only if matching them is cheap."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from math import comb, prod
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig

from .errors import UnsafeAdapterError
from .untrusted import short


# Python matches by trying, so some patterns of ten characters take years on a name of fifty. Steps over a name of this
# many characters are counted; the longest names of modules have about a hundred.
_NAME_LENGTH = 64
_LONGEST_PATTERN = 2_000
_MOST_DEPTH = 8
_GROUP = re.compile(r"\((\?:|\?=|\?!|(?!\?))")
_ANCHOR = re.compile(r"\\b|[\^$]")
_LITERAL = re.compile(r"[\w-]|\\[.\-_]")
_DIGITS = re.compile(r"\\d|\[(?:\\d|0-9)\]")
_ANY_OF = re.compile(r"\.|\\w|\[\^?(?:[\w.-]|\\[.\-_wd])+\]")
_TIMES = re.compile(r"([*+?]|\{(\d{1,2})(,(\d{0,2}))?\})\??")


class _Part(NamedTuple):
    """What a part of a pattern costs.

    Args:
        wild (`int`): Parts in it that take any number of characters.
        wild_last (`int`): The same where nothing follows that could fail, so that the last of them is never tried again.
        ways (`int`): In how many ways the rest of it may match at one place.
        text (`str`, *optional*): The only text that it matches, if there is only one.
    """

    wild: int
    wild_last: int
    ways: int
    text: str | None


_NOTHING = _Part(0, 0, 1, "")


def is_plain_name(text: str) -> bool:
    """Whether a text has nothing in it that a regular expression would read as more than a name of a module."""
    return re.fullmatch(r"[\w.-]+", text) is not None


def matching_steps(pattern: str, before: int = 0) -> int:
    """About how many steps matching a pattern against a name takes at the worst.

    Known are names, `.`, `\\d`, `\\w`, `[...]`, `^`, `$` and `\\b`, groups of alternatives and looking ahead. A single character
    may be repeated, a group may only be left out: so there is nothing whose cost grows with every further character.

    Args:
        pattern (`str`): Pattern.
        before (`int`, *optional*, defaults to `0`): How many `.*` whoever matches it puts in front.

    Raises:
        ValueError: if it is too long, invalid, or holds anything else.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, more than {_LONGEST_PATTERN}")
    part, end = _alternatives(pattern, 0, 0)
    if end < len(pattern):
        raise ValueError(f"it closes a group at {end} that is not open")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error})") from error
    wild = part.wild_last + before
    return comb(_NAME_LENGTH + wild, wild) * part.ways


def _alternatives(pattern: str, place: int, depth: int) -> tuple[_Part, int]:
    """What stands from a place to the end of its group."""
    if depth > _MOST_DEPTH:
        raise ValueError(f"its groups are nested more than {_MOST_DEPTH} deep")
    choices = []
    while True:
        parts: list[_Part] = []
        while place < len(pattern) and pattern[place] not in "|)":
            part, place = _item(pattern, place, depth)
            parts.append(part)
        choices.append(_sequence(parts))
        if place == len(pattern) or pattern[place] == ")":
            return _one_of(choices), place
        place += 1


def _item(pattern: str, place: int, depth: int) -> tuple[_Part, int]:
    if anchor := _ANCHOR.match(pattern, place):
        return _NOTHING, anchor.end()
    if group := _GROUP.match(pattern, place):
        inner, end = _alternatives(pattern, group.end(), depth + 1)
        if end == len(pattern):
            raise ValueError(f"the group at {place} is not closed")
        end += 1
        if group[1] in ("?=", "?!"):
            # What is ahead ends anywhere.
            return _Part(inner.wild_last, inner.wild_last, inner.ways, ""), end
        if pattern[end : end + 1] == "?":
            return inner._replace(ways=inner.ways + 1, text=None), end + 1
        if _TIMES.match(pattern, end):
            raise ValueError(f"it repeats the group at {place}")
        return inner, end
    for kind in (_LITERAL, _DIGITS, _ANY_OF):
        if found := kind.match(pattern, place):
            break
    else:
        raise ValueError(f"it holds {pattern[place]!r} at {place}, which is none of what is known")
    times, end = _TIMES.match(pattern, found.end()), found.end()
    if times is None:
        return _Part(0, 0, 1, found[0][-1] if kind is _LITERAL else None), end
    end = times.end()
    if times[1] == "?":
        return _Part(0, 0, 2, None), end
    if times[2] is not None and times[4] != "":
        return _Part(0, 0, max(1, int(times[4] or times[2]) - int(times[2]) + 1), None), end
    if kind is _DIGITS:  # which stand in names by twos and threes
        return _Part(0, 0, 3, None), end
    return _Part(1, int(found[0] != "."), 1, None), end


def _sequence(parts: list[_Part]) -> _Part:
    parts = [part for part in parts if part != _NOTHING] or [_NOTHING]
    texts = [part.text for part in parts]
    return _Part(
        sum(part.wild for part in parts),
        sum(part.wild for part in parts[:-1]) + parts[-1].wild_last,
        prod(part.ways for part in parts),
        "".join(text for text in texts if text is not None) if None not in texts else None,
    )


def _one_of(choices: list[_Part]) -> _Part:
    if len(choices) == 1:
        return choices[0]
    ways = sum(choice.ways for choice in choices)
    texts = [choice.text for choice in choices if choice.text is not None]
    if len(texts) == len(choices):
        # Of plain texts only those match at the same place that begin alike.
        ways = max(sum(text.startswith(other) for other in texts) for text in texts)
    return _Part(max(part.wild for part in choices), max(part.wild_last for part in choices), ways, None)


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
_LARGEST_NUMBER = 1e9
_MOST_ENTRIES = 10_000
# PEFT compares each name of the base with each pattern: a millisecond for a name at the worst, a microsecond mostly.
_MOST_STEPS = 500_000
# Of more patterns Python keeps none, but compiles them anew for every name.
_MOST_PATTERNS = 500


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
            f"{path}: `peft_type` is {short(config.get('peft_type'))}. Only LORA can be checked before it is loaded: load "
            "it with `PeftModel.from_pretrained` if you trust it."
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsafeAdapterError(f"{path}: `task_type` is {short(config['task_type'])}, but CAUSAL_LM is expected.")
    start = config.get("init_lora_weights", True)
    if not any(start is allowed or start == allowed and isinstance(start, str) for allowed in _HARMLESS_STARTS):
        raise UnsafeAdapterError(
            f"{path}: `init_lora_weights` is {short(start)}, which reads or rewrites the base when the adapter is loaded: "
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
        raise UnsafeAdapterError(f"{path}: `{name}` is {short(value)}. It {why}: it is not loaded.")
    for name, fits in _TYPES.items():
        if config.get(name) is not None and not fits(config[name]):
            raise UnsafeAdapterError(f"{path}: `{name}` is {short(config[name])}, which PEFT does not take.")
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "target_parameters"):
        if isinstance(config.get(name), list) and len(config[name]) > _MOST_ENTRIES:
            raise UnsafeAdapterError(
                f"{path}: `{name}` has {len(config[name])} entries, more than {_MOST_ENTRIES}: do not load it."
            )
    _check_patterns(config, path)


def _check_patterns(config: Mapping[str, Any], path: Path) -> None:
    """Check what PEFT compiles as regular expressions."""
    for name in ("modules_to_save", "layers_pattern"):
        values = [config[name]] if isinstance(config.get(name), str) else config.get(name) or ()
        for value in filter(None, values):
            if not is_plain_name(value):
                raise UnsafeAdapterError(
                    f"{path}: `{name}` is {short(value)}, but only plain names of modules are taken from others."
                )
    steps = patterns = 0
    for name, pattern, before in _patterns(config):
        try:
            steps += matching_steps(pattern, before)
        except ValueError as error:
            raise UnsafeAdapterError(
                f"{path}: `{name}` is {short(pattern)}, a pattern that might take for ever to match, as {error}. Name "
                "the modules in a list, or use a simpler one, such as '.*\\.(q_proj|v_proj)'."
            ) from error
        patterns += before
        if steps > _MOST_STEPS:
            raise UnsafeAdapterError(
                f"{path}: `{name}` is {short(pattern)}, a pattern that might take for ever to match, with too many parts "
                "that take any text. Name the modules in a list, or use a simpler one, such as '.*\\.(q_proj|v_proj)'."
            )
    if patterns > _MOST_PATTERNS:
        raise UnsafeAdapterError(
            f"{path}: `rank_pattern` and `alpha_pattern` have {patterns} entries, more than {_MOST_PATTERNS}: do not load "
            "it."
        )


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Field, pattern, and how many `.*` PEFT puts in front of it."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            yield name, config[name], 0
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(name) or ():
            yield name, pattern, 1


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST_NUMBER < value < _LARGEST_NUMBER


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def is_revision(value: Any) -> bool:
    """Whether a value may be a commit, tag or branch: a path in the cache is made of it."""
    return isinstance(value, str) and re.fullmatch(r"(?!/)(?!.*\.\.)[\w./+-]{0,200}", value) is not None


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
    "revision": is_revision,
    "target_modules": _one_or_list(_is_name),
    "target_parameters": _list_of(_is_name),
    "trainable_token_indices": lambda value: (
        all(map(_list_of(_is_count), value.values())) if isinstance(value, dict) else _list_of(_is_count)(value)
    ),
    "use_dora": _is_flag,
    "use_rslora": _is_flag,
}
