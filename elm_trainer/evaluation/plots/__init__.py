"""Pictures of reports, as PNG files drawn from the JSON alone."""

from .attacks import plot_attacks
from .comparison import plot_comparison
from .gold_standard import plot_gold_standard
from .inside import plot_inside
from .pareto import plot_pareto
from .report import plot_report


__all__ = ["plot_attacks", "plot_comparison", "plot_gold_standard", "plot_inside", "plot_pareto", "plot_report"]
