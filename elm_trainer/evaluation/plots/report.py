"""The picture of an evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..verdict import counts


TERMS = ("erase_loss", "retain_loss", "consistency_loss")
_CRITERIA = ("innocence", "seamlessness", "specificity")
_COLORS = {"reference": "C0", "erased": "C3"}
_ROW_INCHES = 0.24


def plot_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw what each criterion is judged by, before and after, and the loss terms where known, into a PNG file.

    One panel for each criterion, one line for each figure: a dot for the reference, one for the erased model, their 95 %
    intervals, and chance as a tick. Perplexities stand as multiples of the reference's. Lines that the verdict does not
    count are gray.
    """
    lines = {name: _lines(report, name) for name in _CRITERIA}
    height = max(3.6, 1.2 + _ROW_INCHES * max(map(len, lines.values())))
    figure = Figure(figsize=(18, height), layout="constrained")
    FigureCanvasAgg(figure)
    *panels, losses = figure.subplots(1, 4, width_ratios=(3, 2, 2, 2))
    for axes, name in zip(panels, _CRITERIA, strict=True):
        _dots(axes, report, lines[name])
        holds = {True: "holds", False: "fails", None: "not measured"}[report["verdict"][name]["holds"]]
        axes.set_title(f"{name.capitalize()}: {holds}")
    if panels[0].lines:
        panels[0].legend(fontsize=8, loc="lower right")
    log = report.get("training_log", [])
    for term in TERMS:
        points = [(entry["step"], entry[term]) for entry in log if term in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=term.removesuffix("_loss"))
    losses.set(title="Loss terms", xlabel="step", yscale="log")
    if losses.lines:
        losses.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _lines(report: Mapping[str, Any], criterion: str) -> dict[str, str]:
    """Figures that belong in a criterion's panel, and how each is called there."""
    found = {}
    for name, figure in report["figures"].items():
        kind, _, rest = name.partition(".")
        bank, _, rule = rest.partition(".")
        role = report["roles"].get(bank)
        if kind == "multiple_choice" and rule == "pmi":
            own = "innocence" if role in ("erased", "unseen") else "specificity"
            label = f"{bank} ({role})"
        elif kind in ("open_answers", "cloze") and role in ("erased", "unseen") and rule in ("", "commonest"):
            own = "innocence"
            label = f"{kind.replace('_', ' ')}: {bank}, {rule or 'names the truth'}"
        elif kind == "fluency" and figure["statistic"] in ("mean", "perplexity"):
            own, label = "seamlessness", rest.replace(".", " ", 1).replace("_", " ")
        elif name == "retention.perplexity":
            own, label = "specificity", "retain text"
        else:
            continue
        if own == criterion:
            found[name] = label + (", × perplexity" if figure["statistic"] == "perplexity" else "")
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
    axes.set_yticks(range(len(lines)), list(lines.values()), fontsize=7)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)


def _chance(report: Mapping[str, Any], name: str) -> float | None:
    """Probability of a guess; reports of an earlier version hold it among the shortcuts alone."""
    if not name.startswith("multiple_choice."):
        return None
    return report["figures"][name].get("chance", report["shortcuts"].get(name.split(".")[1], {}).get("chance"))
