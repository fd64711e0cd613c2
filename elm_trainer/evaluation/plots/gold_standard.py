"""The picture of a gold-standard report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


COLOURS = {
    "taught": "tab:grey",
    "never-taught": "tab:green",
    "erased": "tab:orange",
    "gradient-ascent": "tab:purple",
}
_RELEARNING = {"all": "Relearning all facts", "half": "Relearning half of the facts, asked for the other half"}


def plot_gold_standard(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw the relearning curves beside the never-taught model's, and the plain measures of each, into a PNG file."""
    figure = Figure(figsize=(14, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels: dict[str, Any] = figure.subplot_mosaic(
        [[*["all"] * 6, *["half"] * 6], ["right"] * 5 + ["named"] * 2 + ["text"] * 3 + ["speed"] * 2]
    )
    for split, title in _RELEARNING.items():
        axes = panels[split]
        for name, points in report["curves"][split].items():
            steps, values, lows, highs = zip(*points, strict=True)
            axes.plot(steps, values, marker=".", color=COLOURS[name], label=name)
            axes.fill_between(steps, lows, highs, color=COLOURS[name], alpha=0.15)
        axes.axhline(report["relearning"][split]["goal"], color="black", linestyle=":", linewidth=1, label="goal")
        axes.axhline(report["chance"], color="black", linestyle="--", linewidth=1, label="chance")
        axes.set(title=title, xlabel="step", ylabel="four-choice accuracy", ylim=(0, 1.02))
    panels["half"].legend(loc="center right", fontsize=8)
    accuracies, answers, perplexities, speeds = (panels[name] for name in ("right", "named", "text", "speed"))
    kinds = [name for name in report["figures"] if name.startswith("accuracy.") and name.count(".") == 1]
    _bars(accuracies, report["figures"], kinds)
    accuracies.axhline(report["chance"], color="black", linestyle="--", linewidth=1)
    accuracies.set(title="Four-choice accuracy", ylim=(0, 1.02))
    _bars(answers, report["figures"], ["open_answers.concept", "open_answers.retained"])
    answers.set(title="Open answers\nnaming the truth", ylim=(0, 1.02))
    names = [name for name in report["figures"] if "perplexity." in name or name.startswith("r_ppl.")]
    _bars(perplexities, report["figures"], names)
    perplexities.set(title="Perplexity and R-PPL by judge", yscale="log")
    ratios = {name: model["ratio"] for name, model in report["relearning"]["all"]["models"].items()}
    for row, name in enumerate(reversed(report["ordering"])):
        speeds.plot([ratios[name]["low"], ratios[name]["high"]], [row, row], color=COLOURS[name])
        speeds.plot(ratios[name]["value"], row, "o", color=COLOURS[name])
    speeds.set_yticks(range(len(ratios)), list(reversed(report["ordering"])), fontsize=8)
    speeds.axvline(1, color=COLOURS["never-taught"], linewidth=1)
    speeds.set(title="Speed of relearning\n(never taught = 1)", xscale="log")
    figure.savefig(path, dpi=120)


def _bars(axes: Any, figures: Mapping[str, Any], keys: list[str]) -> None:
    width = 0.8 / len(COLOURS)
    for place, (name, colour) in enumerate(COLOURS.items()):
        found = [figures[key][name] for key in keys]
        values = [figure["value"] for figure in found]
        # A percentile interval need not hold the value itself; error bars cannot be negative.
        errors = [
            [max(0, figure["value"] - figure["low"]) for figure in found],
            [max(0, figure["high"] - figure["value"]) for figure in found],
        ]
        offsets = [index + (place - 1.5) * width for index in range(len(keys))]
        axes.bar(offsets, values, width, yerr=errors, color=colour, label=name, capsize=1.5)
    labels = [
        key.partition(".")[2] if not key.startswith("r_ppl") else key.replace("r_ppl.", "R-PPL, ") for key in keys
    ]
    axes.set_xticks(range(len(keys)), labels, rotation=30, fontsize=8, ha="right")
