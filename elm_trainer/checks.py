"""Check settings that may come from YAML or the command line: numbers in a dataclass, and the types of values."""

import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from enum import Enum
from numbers import Integral, Real
from typing import Any


RULES: dict[str, Callable[[Any], bool]] = {
    "at least 0": lambda value: value >= 0,
    "above 0": lambda value: value > 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "from 0 to 1": lambda value: 0 <= value <= 1,
}


def check_numbers(config: Any, rules: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Raise `ValueError` for a field of a dataclass that should be a finite number and is none, or that breaks its rule.

    `None` passes where the field's type has it. `rules` are some of `RULES`, each with the names of its fields.
    """
    # Not `field.type`, from which `HfArgumentParser` takes what is optional, for all configs that are made after it.
    kinds = typing.get_type_hints(type(config))
    for field in fields(config):
        if (value := getattr(config, field.name)) is not None or kinds[field.name] in (int, float):
            _check_number(field.name, value, kinds[field.name])
    for rule, names in rules:
        for name in names:
            if (value := getattr(config, name)) is not None and not RULES[rule](value):
                raise ValueError(f"`{name}` is {value}: it must be {rule}.")


def number_range(name: str, value: str | None) -> tuple[int, int] | None:
    """The two whole numbers of a setting such as `"50-300"`, `None` where there is none; raises `ValueError` for anything else."""
    if value is None:
        return None
    first, _, last = str(value).partition("-")
    if not first.isdecimal() or not last.isdecimal() or not 0 < int(first) <= int(last):
        raise ValueError(f"`{name}` is {value!r}: give the smallest and the largest number, such as '50-300'.")
    return int(first), int(last)


def _check_number(name: str, value: Any, kind: Any) -> None:
    real = isinstance(value, Real) and not isinstance(value, bool)
    if kind in (int, int | None) and not (real and isinstance(value, Integral)):
        raise ValueError(f"`{name}` is {value!r}: give a whole number.")
    if kind in (float, float | None):
        if not real:
            hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) else ""
            raise ValueError(f"`{name}` is {value!r}: give a number{hint}.")
        if math.isnan(value) or math.isinf(value) and name != "max_grad_norm":
            raise ValueError(f"`{name}` is {value}: give a finite number.")


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value, as YAML gives it, is of a field's type: a plain one, a list or mapping of it, or either of a union.

    A whole number is a `float` too, and an enumeration takes the text of its values. What YAML cannot hold passes.
    """
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(is_a(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        [inner] = typing.get_args(kind)
        return isinstance(value, list) and all(is_a(item, inner) for item in value)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict)
    if not isinstance(kind, type):
        return True
    if issubclass(kind, Enum):
        return isinstance(value, (str, kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def described(kind: Any) -> str:
    """The name of a type for a message, such as `int` or `list[str]`."""
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
