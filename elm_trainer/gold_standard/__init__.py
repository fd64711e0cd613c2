"""The gold standard: how an erased model compares with one that was never taught."""

from .models import GoldStandardConfig
from .run import gold_standard, render_gold_standard


__all__ = ["GoldStandardConfig", "gold_standard", "render_gold_standard"]
