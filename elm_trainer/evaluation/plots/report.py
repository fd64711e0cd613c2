"""The picture of an evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...files import replacing
from ..labels import figure_label, split_name
from ..tables import NOT_MEASURED
from ..verdict import CRITERIA, counts, read_verdict


TERMS = ("erase_loss", "retain_loss", "consistency_loss")
_COLORS = {"reference": "C0", "erased": "C3"}
_ROW_INCHES = 0.25
# Where accuracy is to be kept, more is better; of all else, less.
_TO_BE_KEPT = ("near", "far")


def plot_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw what each criterion is judged by, before and after, and the loss terms where known, into a PNG file.

    One panel for each criterion, one line for each figure: a dot for the reference, one for the erased model, their 95 %
    intervals, and chance as a tick. Perplexities stand as multiples of the reference's. Lines that the verdict does not
    count are gray. An arrow beside each label points to the better side.
    """
    lines = {name: _lines(report, name) for name in CRITERIA}
    # Innocence has the left column; beside it the others, each as high as its lines need.
    rows = [max(len(lines["seamlessness"]), 3), max(len(lines["specificity"]), 3), 6]
    height = 2.4 + _ROW_INCHES * max(len(lines["innocence"]), sum(rows) + 6)
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    mosaic = [["innocence", name] for name in ("seamlessness", "specificity", "losses")]
    panels: dict[str, Any] = figure.subplot_mosaic(mosaic, height_ratios=[count + 2 for count in rows])
    verdict = read_verdict(report)
    for name in CRITERIA:
        _dots(panels[name], report, lines[name])
        panels[name].set_title(f"{name.capitalize()}: {verdict[name]['state'] or NOT_MEASURED}")
    panels["innocence"].set_xlabel("share of questions; an arrow points to the better side")
    if panels["innocence"].lines:
        panels["innocence"].legend(fontsize=8, loc="lower right")
    losses = panels["losses"]
    log = report.get("training_log", [])
    for term in TERMS:
        points = [(entry["step"], entry[term]) for entry in log if term in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=term.removesuffix("_loss"))
    losses.set(title="Loss terms", xlabel="step", yscale="log")
    if losses.lines:
        losses.legend(fontsize=8)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100)


def _lines(report: Mapping[str, Any], criterion: str) -> dict[str, str]:
    """Figures that belong in a criterion's panel, and how each is called there."""
    found = {}
    for name, figure in report["figures"].items():
        kind, bank, rule = split_name(name)
        role = report["roles"].get(bank)
        _, measured = figure_label(name, report["roles"])
        if kind == "multiple_choice" and rule == "pmi":
            own = "specificity" if role in _TO_BE_KEPT else "innocence"
            label = f"{bank} ({role}), ranked by PMI"
        elif kind in ("open_answers", "cloze") and role in ("erased", "unseen") and rule in ("", "commonest"):
            own, label = "innocence", f"{bank}, {measured}"
        elif kind == "fluency" and figure["statistic"] in ("mean", "perplexity"):
            own, label = "seamlessness", measured
        elif name == "retention.perplexity":
            own, label = "specificity", "unrelated text, perplexity"
        else:
            continue
        if own == criterion:
            multiple = ", × reference" if figure["statistic"] == "perplexity" else ""
            found[name] = f"{label}{multiple} {'→' if role in _TO_BE_KEPT else '←'}"
    return found


def _dots(axes: Any, report: Mapping[str, Any], lines: Mapping[str, str]) -> None:
    for row, name in enumerate(lines):
        figure = report["figures"][name]
        multiples = {"reference": dict.fromkeys(("value", "low", "high"), 1.0), "erased": figure["change"]}
        sides = multiples if figure["statistic"] == "perplexity" else figure
        for offset, (side, usual) in zip((0.14, -0.14), _COLORS.items(), strict=True):
            value, low, high = (sides[side][key] for key in ("value", "low", "high"))
            color = usual if counts(figure) else "lightgray"
            label = side if row == 0 else None
            axes.plot([low, high], [row - offset] * 2, color=color, linewidth=1, alpha=0.6)
            axes.plot(value, row - offset, "o", color=color, markersize=4, label=label)
        chance = _chance(report, name)
        if chance is not None:
            axes.plot([chance] * 2, [row - 0.4, row + 0.4], "k--", linewidth=1, label="chance" if row == 0 else None)
    axes.set_yticks(range(len(lines)), list(lines.values()), fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)


def _chance(report: Mapping[str, Any], name: str) -> float | None:
    """Probability of a guess; reports of an earlier version hold it among the shortcuts alone."""
    if not name.startswith("multiple_choice."):
        return None
    return report["figures"][name].get("chance", report["shortcuts"].get(name.split(".")[1], {}).get("chance"))
