"""The picture of a report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


TERMS = ("erase_loss", "retain_loss", "consistency_loss")


def plot_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw accuracy before and after, the two perplexities, and the loss terms over the steps into a PNG file."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    banks, perplexities, losses = figure.subplots(1, 3, width_ratios=(3, 1.5, 2))
    names = [name.split(".")[1] for name in report["figures"] if name.endswith(".pmi")]
    _bars(banks, report, [f"multiple_choice.{name}.pmi" for name in names], names)
    banks.axhline(report["chance"], color="grey", linestyle="--", linewidth=1, label="chance")
    banks.set(title="Four-choice accuracy (PMI)", ylim=(0, 1))
    banks.legend()
    _bars(perplexities, report, ["fluency.r_ppl", "retention.perplexity"], ["R-PPL", "retain"])
    perplexities.set(title="Perplexity")
    for term in TERMS:
        points = [(entry["step"], entry[term]) for entry in report["training_log"] if term in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=term.removesuffix("_loss"))
    losses.set(title="Loss terms", xlabel="step", yscale="log")
    if losses.lines:
        losses.legend()
    figure.savefig(path, dpi=120)


def _bars(axes: Any, report: Mapping[str, Any], keys: list[str], labels: list[str]) -> None:
    for offset, side in ((-0.2, "reference"), (0.2, "erased")):
        figures = [report["figures"][key][side] for key in keys]
        values = [figure["value"] for figure in figures]
        # A percentile interval need not hold the value itself; error bars cannot be negative.
        errors = [
            [max(0, figure["value"] - figure["low"]) for figure in figures],
            [max(0, figure["high"] - figure["value"]) for figure in figures],
        ]
        axes.bar([i + offset for i in range(len(keys))], values, 0.4, yerr=errors, label=side, capsize=2)
    axes.set_xticks(range(len(labels)), labels, rotation=20)
