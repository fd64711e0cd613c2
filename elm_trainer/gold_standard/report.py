"""The gold standard as a table and as a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from ..evaluation.plots import plot_file
from ..evaluation.tables import terminal_table
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
    table = terminal_table("Beside a model that was never taught (intervals: gold_standard.json)", *columns)
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


def _cell(metric: Mapping[str, float]) -> str:
    # With intervals, four models would not stand side by side in 80 columns.
    return f"{metric['value']:.3g}"


COLORS = {"taught": "tab:grey", "never-taught": "tab:green", "erased": "tab:orange", "gradient-ascent": "tab:purple"}
_RELEARNING = {"all": "Relearning all facts", "half": "Relearning half of the facts, asked for the other half"}


def plot_gold_standard(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw the relearning curves beside the never-taught model's, and the plain measures of each, into a PNG file."""
    with plot_file(path, 12, 12) as figure:
        top, middle, bottom = figure.subfigures(3, 1, squeeze=False)[:, 0]
        panels = dict(zip(_RELEARNING, top.subplots(1, 2), strict=True))
        accuracies, answers = middle.subplots(1, 2, width_ratios=(2, 1))
        perplexities, speeds = bottom.subplots(1, 2, width_ratios=(4, 3))
        for split, title in _RELEARNING.items():
            axes = panels[split]
            for name, points in report["curves"][split].items():
                steps, values, lows, highs = zip(*points, strict=True)
                axes.plot(steps, values, marker=".", color=COLORS[name], label=name)
                axes.fill_between(steps, lows, highs, color=COLORS[name], alpha=0.15)
            axes.axhline(report["relearning"][split]["goal"], color="black", linestyle=":", linewidth=1, label="goal")
            axes.axhline(report["chance"], color="black", linestyle="--", linewidth=1, label="chance")
            axes.set(title=title, xlabel="step", ylabel="four-choice accuracy", ylim=(0, 1.02))
        panels["half"].legend(loc="center right", fontsize=8)
        kinds = [name for name in report["figures"] if name.startswith("accuracy.") and name.count(".") == 1]
        _bars(accuracies, report["figures"], kinds)
        accuracies.axhline(report["chance"], color="black", linestyle="--", linewidth=1)
        accuracies.set(title="Four-choice accuracy", ylim=(0, 1.02))
        _bars(answers, report["figures"], ["open_answers.concept", "open_answers.retained"])
        answers.set(title="Free answers that name the truth", ylim=(0, 1.02))
        names = [name for name in report["figures"] if "perplexity." in name or name.startswith("r_ppl.")]
        _bars(perplexities, report["figures"], names)
        perplexities.set(title="Perplexity and R-PPL by judge", yscale="log")
        ratios = {name: model["ratio"] for name, model in report["relearning"]["all"]["models"].items()}
        for row, name in enumerate(reversed(report["ordering"])):
            speeds.plot([ratios[name]["low"], ratios[name]["high"]], [row, row], color=COLORS[name])
            speeds.plot(ratios[name]["value"], row, "o", color=COLORS[name])
        speeds.set_yticks(range(len(ratios)), list(reversed(report["ordering"])), fontsize=8)
        speeds.axvline(1, color=COLORS["never-taught"], linewidth=1)
        speeds.set(title="Speed of relearning (never taught = 1)", xscale="log")


def _bars(axes: Any, figures: Mapping[str, Any], keys: list[str]) -> None:
    width = 0.8 / len(COLORS)
    for place, (name, color) in enumerate(COLORS.items()):
        found = [figures[key][name] for key in keys]
        values = [figure["value"] for figure in found]
        # A percentile interval need not hold the value itself; error bars cannot be negative.
        errors = [
            [max(0, figure["value"] - figure["low"]) for figure in found],
            [max(0, figure["high"] - figure["value"]) for figure in found],
        ]
        offsets = [index + (place - 1.5) * width for index in range(len(keys))]
        axes.bar(offsets, values, width, yerr=errors, color=color, label=name, capsize=1.5)
    axes.set_xticks(range(len(keys)), [_label(key) for key in keys], fontsize=9)


def _label(key: str) -> str:
    kind, _, what = key.partition(".")
    # What is erased from the invented world is who keeps a place.
    words = {
        "keepers": "keepers\n(the concept)",
        "retained": "all that is\nretained",
        "retained_answers": "retained\nanswers",
    }
    return f"R-PPL by\n{what}" if kind == "r_ppl" else words.get(what, what)
