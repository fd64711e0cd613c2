"""Check settings that may come from YAML or the command line: numbers in a dataclass, and the types of values.

The settings of commands whose work needs torch are here too, so that `--help` and a wrong value need not wait for it.
"""

import logging
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
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
_PIVOTS = ("plain", "digressing")


def check_numbers(config: Any, rules: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Raise `ValueError` for a field of a dataclass that should be a finite number and is none, or that breaks its rule.

    `None` passes where the field's type has it. `rules` are some of `RULES`, each with the names of its fields.
    """
    # Not `field.type`, from which `HfArgumentParser` takes what is optional, for all configs that are made after it.
    kinds: dict[str, Any] = {}
    with suppress(NameError):  # a type that is imported for type checkers alone
        kinds = typing.get_type_hints(type(config))
    for one in fields(config):
        if (value := getattr(config, one.name)) is not None or kinds.get(one.name) in (int, float):
            _check_number(one.name, value, kinds.get(one.name, one.type))
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


@contextmanager
def hushed(logger: str = "elm_trainer") -> Iterator[None]:
    """While this holds, the logger of this name does not warn; by default ours, where what is only checked will be said when it is done."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)


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


@dataclass
class SynthesisConfig:
    r"""
    Settings of guided generation.

    Parameters:
        gamma (`float`, *optional*, defaults to `3.0`): Guidance γ: the next token is drawn from `b + γ·(n − e)`.
        temperature (`float`, *optional*, defaults to `1.0`): Sampling temperature.
        top_k (`int`, *optional*, defaults to `50`): Tokens kept per step; `0` keeps all.
        plausibility (`float`, *optional*, defaults to `0.05`): Tokens below this share of the largest probability (of
            the plain and the novice stream mixed) are dropped.
        max_new_tokens (`int`, *optional*, defaults to `24`): Longest completion.
        max_new_tokens_from (`int`, *optional*): Draw how long each completion may be between this and `max_new_tokens`.
        prompt_characters (`str`, *optional*): Cut each prompt to a length drawn from such a range of characters, as
            `"50-300"`. Shorter ones are dropped.
        pivots (`str`, *optional*, defaults to `"plain"`): Sentences between prompt and completion: `"plain"` ones, or
            `"digressing"`, which call the subject dangerous and turn to a pleasant one, as in the released code.
        batch_size (`int`, *optional*, defaults to `16`): Prompts per batch; three streams are run for each.
        seed (`int`, *optional*, defaults to `0`): Seed of contexts, pivots and samples.
        min_words (`int`, *optional*, defaults to `5`): A completion with fewer words is dropped.
        keep_on_topic (`bool`, *optional*, defaults to `False`): Keep completions that name a keyword of the concept.
        max_repetition (`float`, *optional*, defaults to `0.3`): A completion with a larger share of repeated word
            3-grams is dropped.
    """

    _argument_group_name = "of the sampler"

    gamma: float = field(default=3.0, metadata={"help": "Guidance."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_k: int = field(default=50, metadata={"help": "Tokens kept per step."})
    plausibility: float = field(default=0.05, metadata={"help": "Plausibility constraint."})
    max_new_tokens: int = field(default=24, metadata={"help": "Longest completion in tokens."})
    max_new_tokens_from: int | None = field(default=None, metadata={"help": "Draw that length from here on."})
    prompt_characters: str | None = field(default=None, metadata={"help": "Range of prompts' lengths, as 50-300."})
    pivots: str = field(default="plain", metadata={"help": "Pivot sentences.", "choices": [*_PIVOTS]})
    batch_size: int = field(default=16, metadata={"help": "Prompts per batch."})
    seed: int = field(default=0, metadata={"help": "Seed."})
    min_words: int = field(default=5, metadata={"help": "Fewest words of a completion."})
    keep_on_topic: bool = field(default=False, metadata={"help": "Keep completions that name the concept."})
    max_repetition: float = field(default=0.3, metadata={"help": "Largest share of repeated 3-grams."})

    def __post_init__(self):
        rules = (
            ("at least 0", ("gamma", "seed", "top_k", "min_words")),
            ("at least 1", ("max_new_tokens", "max_new_tokens_from", "batch_size")),
            ("above 0", ("temperature",)),
            ("from 0 to 1", ("plausibility", "max_repetition")),
        )
        check_numbers(self, rules)
        number_range("prompt_characters", self.prompt_characters)
        if self.pivots not in _PIVOTS:
            raise ValueError(f"`pivots` is {self.pivots!r}: use one of {', '.join(_PIVOTS)}.")
        if (self.max_new_tokens_from or 0) > self.max_new_tokens:
            told = f"`max_new_tokens_from` is {self.max_new_tokens_from}, above `max_new_tokens={self.max_new_tokens}`"
            raise ValueError(f"{told}: lower it.")

    @classmethod
    def released(cls, **fields: Any) -> "SynthesisConfig":
        """The settings of the released code (its `prepare_consistency_data.py`), but for the `fields` that are given."""
        settings: dict[str, Any] = dict(
            gamma=3.0, top_k=0, plausibility=0.0, max_new_tokens=300, max_new_tokens_from=100,
            prompt_characters="50-300", pivots="digressing", min_words=0, keep_on_topic=True, max_repetition=1.0,
        )  # fmt: skip
        return cls(**(settings | fields))
