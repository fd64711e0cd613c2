"""A stranger's `adapter_config.json`: plain LoRA is accepted; patterns are accepted only if matching them is cheap."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from math import comb, prod
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig

from .errors import UnsafeAdapterError
from .untrusted import (
    LARGEST_NUMBER,
    LARGEST_RANK,
    LONGEST_PATTERN,
    MOST_ENTRIES,
    MOST_GROUPS,
    MOST_PATTERNS,
    MOST_STEPS,
    short,
)


def is_revision(value: Any) -> bool:
    """Whether a value may be a commit, tag or branch: a path in the cache is made of it."""
    return isinstance(value, str) and re.fullmatch(r"(?!/)(?!.*\.\.)[\w./+-]{0,200}", value) is not None


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST_NUMBER < value < LARGEST_NUMBER


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


# What a LoRA adapter is made of. Of a list or a table (by pattern or by module) each entry is looked at.
_FIELDS: Mapping[str, tuple[Callable[[Any], bool], set[str]]] = {
    "alpha_pattern": (_is_number, {"table"}),
    "base_model_name_or_path": (_is_name, {"one"}),
    "ensure_weight_tying": (_is_flag, {"one"}),
    "exclude_modules": (_is_name, {"one", "list"}),
    "fan_in_fan_out": (_is_flag, {"one"}),
    "layers_pattern": (_is_name, {"one", "list"}),
    "layers_to_transform": (_is_count, {"one", "list"}),
    "lora_alpha": (_is_number, {"one"}),
    "lora_bias": (_is_flag, {"one"}),
    "lora_dropout": (_is_number, {"one"}),
    "modules_to_save": (_is_name, {"list"}),
    "r": (_is_rank, {"one"}),
    "rank_pattern": (_is_rank, {"table"}),
    "revision": (is_revision, {"one"}),
    "target_modules": (_is_name, {"one", "list"}),
    "target_parameters": (_is_name, {"list"}),
    "trainable_token_indices": (_is_counts, {"one", "table"}),
    "use_dora": (_is_flag, {"one"}),
    "use_rslora": (_is_flag, {"one"}),
}
# Others of plain LoRA, which are checked by themselves or are of no consequence. PEFT gives everything else to
# importers, initializers that rewrite the base, or variants that route between further adapters.
_PLAIN = {*_FIELDS, "inference_mode", "init_lora_weights", "peft_type", "peft_version", "task_type"}
_WHY = {
    "auto_mapping": 'imports a library by its name (save the adapter with `task_type="CAUSAL_LM"` to be without)',
    "arrow_config": "routes between further adapters",
    "bias": "overwrites biases of the base, which `unload` does not bring back",
    "corda_config": "reads a pickled cache",
    "eva_config": "decomposes activations of data",
    "kasa_config": "truncates weights of the base",
    "layer_replication": "rebuilds the base with more layers",
    "loftq_config": "quantizes weights of the base",
    "lora_ga_config": "reads a pickled cache",
    "megatron_config": "imports a library by its name",
    "megatron_core": "imports a library by its name",
}
# The other values of `init_lora_weights` decompose the base, or rewrite it, when the adapter is loaded.
_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal")


def check_adapter_config(config: Any, path: Path) -> None:
    """Check the contents of an `adapter_config.json`.

    Fields that nobody here knows pass, since PEFT leaves them out with a warning.

    Args:
        path: Its place, for the error.

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
    # Fields of the installed PEFT, and those of other versions that are known to be more than plain LoRA.
    defaults = dict.fromkeys(_WHY) | {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for name, default in defaults.items():
        value = config.get(name)
        if name not in _PLAIN and value and value != default:
            why = _WHY.get(name, "is not part of plain LoRA")
            raise UnsafeAdapterError(f"{path}: `{name}` is {short(value)}. It {why}: it is not loaded.")
    for name, (is_one, forms) in _FIELDS.items():
        if config.get(name) is not None and not _fits(config[name], is_one, forms):
            raise UnsafeAdapterError(f"{path}: `{name}` is {short(config[name])}, which PEFT does not take.")
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "target_parameters"):
        if isinstance(config.get(name), list) and len(config[name]) > MOST_ENTRIES:
            raise UnsafeAdapterError(
                f"{path}: `{name}` has {len(config[name])} entries, more than {MOST_ENTRIES}: do not load it."
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
            if steps > MOST_STEPS:
                raise ValueError("it has too many parts that take any text")
        except ValueError as error:
            raise UnsafeAdapterError(
                f"{path}: `{name}` is {short(pattern)}, a pattern that might take for ever to match, as {error}. Name "
                "the modules in a list, or use a simpler one, such as '.*\\.(q_proj|v_proj)'."
            ) from error
        patterns += before
    if patterns > MOST_PATTERNS:
        raise UnsafeAdapterError(
            f"{path}: `rank_pattern` and `alpha_pattern` have {patterns} entries, more than {MOST_PATTERNS}: do not load "
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


def _fits(value: Any, is_one: Callable[[Any], bool], forms: set[str]) -> bool:
    if "table" in forms and isinstance(value, dict):
        return all(map(is_one, value.values()))
    if "list" in forms and isinstance(value, list):
        return all(map(is_one, value))
    return "one" in forms and is_one(value)


# Python matches by trying, so some patterns of ten characters take years on a name of fifty. Steps over a name of this
# many characters are counted; the longest names of modules have about a hundred.
_NAME_LENGTH = 64
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
        before: How many `.*` whoever matches it puts in front.

    Raises:
        ValueError: if it is too long, invalid, or holds anything else.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, more than {LONGEST_PATTERN}")
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
    if depth > MOST_GROUPS:
        raise ValueError(f"its groups are nested more than {MOST_GROUPS} deep")
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
