"""Attacks on an erasure: each tries to bring the knowledge back, and reports how much of it came."""

from .base import Attack, AttackResult, AttackTarget
from .prompting import (
    BestOfNAttack,
    FewShotAttack,
    FillerAttack,
    GcgAttack,
    ParaphraseAttack,
    PrefillingAttack,
    TranslationAttack,
)
from .report import markdown_attacks, render_attacks
from .run import ATTACKS, attack_erasure, built_in_target, built_in_wordings, default_attacks, load_attacks
from .weights import LayerRemovalAttack, QuantizationAttack, RelearningAttack, ScalingAttack


__all__ = [
    "ATTACKS",
    "Attack",
    "AttackResult",
    "AttackTarget",
    "BestOfNAttack",
    "FewShotAttack",
    "FillerAttack",
    "GcgAttack",
    "LayerRemovalAttack",
    "ParaphraseAttack",
    "PrefillingAttack",
    "QuantizationAttack",
    "RelearningAttack",
    "ScalingAttack",
    "TranslationAttack",
    "attack_erasure",
    "built_in_target",
    "built_in_wordings",
    "default_attacks",
    "load_attacks",
    "markdown_attacks",
    "render_attacks",
]
