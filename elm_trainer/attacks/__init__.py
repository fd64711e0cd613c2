"""Attacks on an erasure: each tries to bring the knowledge back, and reports how much of it came."""

# ruff: noqa: F401 (what this imports is what the package exports)

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
