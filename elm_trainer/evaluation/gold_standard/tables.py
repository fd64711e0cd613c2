"""The gold standard as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Column, Table

from .models import MODELS


# The measures that a reader compares first; the report holds all of them.
_SHOWN = {
    "accuracy.keepers": "concept, ranked rightly",
    "accuracy.retained": "retained, ranked rightly",
    "open_answers.concept": "concept, named freely",
    "open_answers.retained": "retained, named freely",
    "perplexity.prose": "perplexity of prose",
}


def render_gold_standard(report: Mapping[str, Any]) -> Table:
    """The four models side by side: plain measures, then how fast each learns the concept."""
    columns = (Column("measure"), *(Column(model, no_wrap=True) for model in MODELS))
    table = Table(
        *columns,
        title="Beside a model that was never taught (intervals: gold_standard.json)",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in _SHOWN:
        table.add_row(_SHOWN[name], *(_cell(report["figures"][name][model]) for model in MODELS))
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
    # With intervals, four models would not stand side by side in 80 columns.
    return f"{figure['value']:.3g}"
