"""All erasure methods on the same data, with the same budgets and the same search: an honest comparison."""

from .config import ComparisonConfig, MethodSettings
from .run import compare_methods
from .tables import markdown_comparison, render_comparison


__all__ = ["ComparisonConfig", "MethodSettings", "compare_methods", "markdown_comparison", "render_comparison"]
