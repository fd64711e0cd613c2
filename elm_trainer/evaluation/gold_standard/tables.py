"""The gold standard as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from .models import MODELS


# The measures that a reader compares first; the report holds all of them.
_SHOWN = ("accuracy.keepers", "accuracy.retained", "open_answers.concept", "open_answers.retained", "perplexity.prose")


def render_gold_standard(report: Mapping[str, Any]) -> Table:
    """The four models side by side: plain measures, then how fast each learns the concept."""
    table = Table("measure", *MODELS, title="Beside a model that was never taught (95 % intervals)")
    for name in _SHOWN:
        table.add_row(name, *(_cell(report["figures"][name][model]) for model in MODELS))
    for split, found in report["relearning"].items():
        for measure, label in (("steps", "steps to relearn"), ("ratio", "times the never-taught's speed")):
            row = []
            for model in MODELS:
                entry = found["models"][model]
                # A model that never got there needs at least so many steps.
                row.append(("" if entry["reached"] else "> ") * (measure == "steps") + _cell(entry[measure]))
            table.add_row(f"{label} ({split})", *row)
    return table


def _cell(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3g} [{figure['low']:.3g}, {figure['high']:.3g}]"
