"""Attacks on an erasure: each tries to bring the knowledge back, and reports how much of it came."""

from .base import Attack, AttackResult, AttackTarget
from .few_shot import FewShotAttack
from .gcg import GcgAttack
from .generation import BestOfNAttack, PrefillingAttack
from .ladder import ATTACKS, default_attacks, load_attacks
from .quantization import QuantizationAttack
from .relearning import RelearningAttack
from .rewording import FillerAttack, ParaphraseAttack, TranslationAttack
from .run import attack_erasure, built_in_target
from .scaling import LayerRemovalAttack, ScalingAttack
from .tables import markdown_attacks, render_attacks


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
    "default_attacks",
    "load_attacks",
    "markdown_attacks",
    "render_attacks",
]
