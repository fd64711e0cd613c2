"""Check the numbers in a dataclass of settings, which may come from YAML or the command line."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
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
    """Raise `ValueError` for a field of a dataclass that should be a number and is none, or that breaks its rule.

    Args:
        config: Dataclass. Its numbers must be finite, but for `max_grad_norm`. `None` passes.
        rules: A rule, such as `"at least 0"`, with the names of its fields.
    """
    for field in fields(config):
        if (value := getattr(config, field.name)) is not None:
            _check_number(field.name, value, field.type)
    for rule, names in rules:
        for name in names:
            if (value := getattr(config, name)) is not None and not RULES[rule](value):
                raise ValueError(f"`{name}` is {value}: it must be {rule}.")


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
