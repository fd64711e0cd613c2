"""The picture of a comparison: innocence against seamlessness and specificity, for both budgets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from ...files import replacing


TITLES = {"updates": "the same number of updates", "seconds": "the same time"}


def plot_comparison(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw a comparison into a PNG file: a row for each budget, all axes relative to the reference (the cross).

    Up: the change of PMI accuracy on the concept. Across: the change on neighbouring (circle) and unrelated (square)
    knowledge, and R-PPL and perplexity on retain text (diamond) as multiples. Lines are 95 % intervals. Down and towards
    the cross's column is better.
    """
    figure = Figure(figsize=(12, 10), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharey=True)
    up = f"multiple_choice.{report['concept']}.pmi"
    for (kept, fluent), (budget, title) in zip(panels, TITLES.items(), strict=True):
        for index, row in enumerate(report["tables"][budget]["methods"].values()):
            if not row["figures"]:
                continue
            changes = {name: found["change"] for name, found in row["figures"].items()}
            colour = f"C{index}"
            for name, marker in (("specificity.near", "o"), ("specificity.far", "s")):
                if name in changes:
                    _point(kept, changes[name], changes[up], marker, colour)
            _point(fluent, changes["fluency.greedy.r_ppl"], changes[up], "o", colour)
            _point(fluent, changes["retention.perplexity"], changes[up], "D", colour)
        for axes, start in ((kept, 0), (fluent, 1)):
            axes.plot(start, 0, "+", color="black", markersize=14)
            axes.axhline(0, color="grey", linewidth=0.6)
            axes.axvline(start, color="grey", linewidth=0.6)
            axes.set(ylabel="concept ranked rightly (PMI), change")
        kept.set(xlabel="change of accuracy: near (circle), far (square)", title=f"Innocence and specificity, {title}")
        fluent.set(
            xlabel="multiple of the reference's: R-PPL (circle), retain perplexity (diamond)",
            title=f"Innocence and seamlessness, {title}",
            xscale="log",
        )
        # Doubles, and one between: the labels of the decades' parts would lie upon each other.
        fluent.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
        fluent.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        fluent.xaxis.set_minor_locator(NullLocator())
    marks = [Line2D([], [], color=f"C{index}", marker="o", linestyle="") for index in range(len(report["methods"]))]
    # Beside the points names would lie upon each other.
    figure.legend(marks, [found["label"] for found in report["methods"].values()], loc="outside lower center", ncols=8)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100)


def _point(axes: Any, across: Mapping[str, float], up: Mapping[str, float], marker: str, colour: str) -> None:
    axes.plot([across["low"], across["high"]], [up["value"]] * 2, color=colour, alpha=0.4)
    axes.plot([across["value"]] * 2, [up["low"], up["high"]], color=colour, alpha=0.4)
    axes.plot(across["value"], up["value"], marker, color=colour)
