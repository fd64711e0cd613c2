"""The gold standard: how an erased model compares with one that was never taught."""

from .models import GoldStandardConfig
from .report import render_gold_standard
from .run import gold_standard


__all__ = ["GoldStandardConfig", "gold_standard", "render_gold_standard"]
