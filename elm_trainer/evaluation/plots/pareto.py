"""Innocence against specificity and seamlessness, for several erasures of one model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...files import replacing
from ..verdict import counts


def plot_pareto(reports: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw evaluation reports of the same reference, by name, into a PNG file.

    Left: mean PMI accuracy on the erased banks against the mean change on near and far banks; right: the same against
    R-PPL as a multiple of the reference's. Down and to the right, or down and to the left, is better.
    """
    figure = Figure(figsize=(12, 5 + 0.2 * len(reports) / 4), layout="constrained")
    FigureCanvasAgg(figure)
    kept, fluent = figure.subplots(1, 2)
    for index, (name, report) in enumerate(reports.items()):
        colour = f"C{index % 10}"
        figures, roles = report["figures"], report["roles"]
        accuracy = _accuracy(report, "erased")
        for role, marker in (("near", "o"), ("far", "s")):
            banks = _of(roles, role)
            if banks:
                moved = _mean(figures[f"multiple_choice.{bank}.pmi"]["change"]["value"] for bank in banks)
                kept.plot(moved, accuracy, marker, color=colour)
        change = figures["fluency.greedy.r_ppl"]["change"]
        fluent.plot([change["low"], change["high"]], [accuracy, accuracy], color=colour, alpha=0.5)
        fluent.plot(change["value"], accuracy, "o", color=colour, label=name)
    first = next(iter(reports.values()))
    before = _accuracy(first, "reference")
    for axes in (kept, fluent):
        axes.axhline(before, color="grey", linewidth=1, label="reference" if axes is fluent else None)
        axes.set(ylabel="concept ranked rightly (PMI)")
    kept.axvline(0, color="grey", linewidth=1)
    kept.set(xlabel="change of accuracy: near (circle), far (square)", title="Innocence and specificity")
    fluent.set(xlabel="R-PPL, as a multiple of the reference's", title="Innocence and seamlessness")
    # Beside the points names would lie upon each other.
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100)


def _accuracy(report: Mapping[str, Any], side: str) -> float:
    """Mean over the ways of asking for the concept in which the reference knows the answers; over all if in none."""
    figures = [report["figures"][f"multiple_choice.{bank}.pmi"] for bank in _of(report["roles"], "erased")]
    return _mean(figure[side]["value"] for figure in [f for f in figures if counts(f)] or figures)


def _of(roles: Mapping[str, str], role: str) -> list[str]:
    return [bank for bank, found in roles.items() if found == role]


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)
