"""The picture of an evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


TERMS = ("erase_loss", "retain_loss", "consistency_loss")


def plot_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw accuracy, free answers and perplexities before and after, and the loss terms where known, into a PNG file."""
    log = report.get("training_log", [])
    figure = Figure(figsize=(16, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    banks, answers, perplexities, losses = figure.subplots(1, 4, width_ratios=(3, 3, 2, 2))
    names = [name.split(".")[1] for name in report["figures"] if name.endswith(".pmi")]
    _bars(banks, report, {f"multiple_choice.{name}.pmi": f"{name}\n({report['roles'][name]})" for name in names})
    for index, name in enumerate(names):
        chance = report["shortcuts"].get(name, {}).get("chance")
        if chance is not None:
            label = "chance" if index == 0 else None
            banks.plot(
                [index - 0.45, index + 0.45], [chance] * 2, color="grey", linestyle="--", linewidth=1, label=label
            )
    banks.set(title="Ranked rightly (PMI)", ylim=(0, 1))
    banks.legend(fontsize=8)
    _bars(
        answers,
        report,
        {name: name.replace(".", "\n") for name in report["figures"] if name.startswith(("open_answers.", "cloze."))},
    )
    answers.set(title="Named in a greedy answer", ylim=(0, 1))
    labels = {"fluency.greedy.r_ppl": "R-PPL\ngreedy", "fluency.sampled.r_ppl": "R-PPL\nsampled"}
    _bars(perplexities, report, labels | {"retention.perplexity": "retain\ntext"})
    perplexities.set(title="Perplexity")
    for term in TERMS:
        points = [(entry["step"], entry[term]) for entry in log if term in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=term.removesuffix("_loss"))
    losses.set(title="Loss terms", xlabel="step", yscale="log")
    if losses.lines:
        losses.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _bars(axes: Any, report: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    measured = {key: label for key, label in labels.items() if key in report["figures"]}
    for offset, side in ((-0.2, "reference"), (0.2, "erased")):
        figures = [report["figures"][key][side] for key in measured]
        values = [figure["value"] for figure in figures]
        # A percentile interval need not hold the value itself; error bars cannot be negative.
        errors = [
            [max(0, figure["value"] - figure["low"]) for figure in figures],
            [max(0, figure["high"] - figure["value"]) for figure in figures],
        ]
        axes.bar([i + offset for i in range(len(figures))], values, 0.4, yerr=errors, label=side, capsize=2)
    axes.set_xticks(range(len(measured)), list(measured.values()), rotation=30, fontsize=7)
