"""Which attacks are run: a list in YAML, each with its settings."""

import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from .base import Attack
from .few_shot import FewShotAttack
from .gcg import GcgAttack
from .generation import BestOfNAttack, PrefillingAttack
from .quantization import QuantizationAttack
from .relearning import RelearningAttack
from .rewording import FillerAttack, ParaphraseAttack, TranslationAttack
from .scaling import LayerRemovalAttack, ScalingAttack


_ALL: tuple[type[Attack], ...] = (
    ScalingAttack,
    LayerRemovalAttack,
    QuantizationAttack,
    ParaphraseAttack,
    TranslationAttack,
    FillerAttack,
    FewShotAttack,
    PrefillingAttack,
    BestOfNAttack,
    GcgAttack,
    RelearningAttack,
)
ATTACKS = {attack.name: attack for attack in _ALL}


def default_attacks(names: Sequence[str] | None = None) -> list[Attack]:
    """The attacks of the package's own ladder, which runs on a CPU in minutes with a small model.

    Args:
        names (`Sequence[str]`, *optional*): Only the attacks of these names.

    Raises:
        ValueError: for an unknown name (the message lists them).
    """
    if unknown := sorted(set(names or ()) - ATTACKS.keys()):
        raise ValueError(f"`attacks` names {unknown}, which do not exist; use: {', '.join(ATTACKS)}.")
    attacks = _parse("default.yaml", (files("elm_trainer.data") / "attacks" / "default.yaml").read_text("utf-8"))
    return [attack for attack in attacks if names is None or attack.name in names]


def load_attacks(path: str | Path) -> list[Attack]:
    """Read a ladder: a YAML list whose entries name an `attack` and any of its settings.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for malformed YAML, an unknown attack or setting (the message lists those there are), a value of
            the wrong type, or one that the attack refuses.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise OSError(f"Ladder {path} cannot be read ({error}): check the path.") from error
    return _parse(str(path), text)


def _parse(name: str, text: str) -> list[Attack]:
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Ladder {name} cannot be parsed ({error}): correct it.") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"Ladder {name} holds no list of attacks: write entries like `- attack: scaling`.")
    return [_build(f"Ladder {name}, entry {number}", entry) for number, entry in enumerate(entries, 1)]


def _build(where: str, entry: Any) -> Attack:
    if not isinstance(entry, dict) or "attack" not in entry:
        raise ValueError(f"{where} is {entry!r}: write a mapping with the key `attack`.")
    settings = dict(entry)
    kind = settings.pop("attack")
    if kind not in ATTACKS:
        raise ValueError(f"{where} names the attack {kind!r}, which does not exist; use: {', '.join(ATTACKS)}.")
    known = {field.name: field.type for field in fields(ATTACKS[kind])}
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{where}: {kind} has no setting {key!r}; it has: {', '.join(known)}.")
        if not _is_a(value, known[key]):
            hint = ": YAML reads it as text, write 2.0e-5" if isinstance(value, str) and _is_number(value) else ""
            raise ValueError(f"{where}: `{key}` is {value!r}, but must be {_described(known[key])}{hint}.")
    try:
        return ATTACKS[kind](**settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a YAML value is of a setting's type: a plain one, a list of it, or either of a union."""
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        [inner] = typing.get_args(kind)
        return isinstance(value, list) and all(_is_a(item, inner) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _described(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
