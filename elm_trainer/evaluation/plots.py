"""Plots of evaluation reports, as PNG files drawn from the JSON alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import replacing
from .tables import NOT_MEASURED, figure_label, split_name
from .verdict import CRITERIA, counts, read_verdict


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


COLOURS = {"reference": "tab:grey", "erased": "tab:orange"}


def plot_inside(inside: Mapping[str, Any], path: str | Path) -> None:
    """Draw what [`~elm_trainer.evaluation.inside.look_inside`] returns, four panels over the layers, into a PNG file."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    (probe, lens), (norms, ranks) = figure.subplots(2, 2)
    for side, colour in COLOURS.items():
        _curve(probe, inside["probe"][side]["accuracy"], colour, side)
        control = [point["value"] for point in inside["probe"][side]["control"]]
        probe.plot(control, linestyle=":", color=colour, label=f"{side}, labels shuffled")
        _curve(lens, inside["logit_lens"][side]["accuracy"], colour, side)
    probe.axhline(0.5, color="black", linestyle="--", linewidth=1, label="chance")
    probe.set(title="Linear probe: is the statement true?", ylabel="accuracy", ylim=(0.3, 1.02))
    lens.axhline(inside["logit_lens"]["chance"], color="black", linestyle="--", linewidth=1, label="chance")
    lens.set(title="Logit lens: the right option's first token leads", ylabel="accuracy", ylim=(0, 1.02))
    for text, colour in (("forget", "tab:red"), ("retain", "tab:blue")):
        _curve(norms, inside["norms"][text]["ratio"], colour, f"{text} text")
    norms.axhline(1, color="black", linestyle="--", linewidth=1)
    norms.set(title="Size of the hidden states", ylabel="L2 norm, erased / reference")
    norms.ticklabel_format(axis="y", useOffset=False)
    hidden = inside["effect_rank"]["hidden"]
    tokens = hidden["tokens"]
    ranks.plot(
        hidden["effective_rank"], marker=".", color="tab:green", label=f"change of hidden states ({tokens} tokens)"
    )
    # The state behind a layer comes after the embeddings' and so has the next number.
    points = [
        (weight["layer"] + 1, weight["effective_rank"])
        for weight in inside["effect_rank"]["weights"] or []
        if weight["layer"] is not None
    ]
    if points:
        ranks.plot(*zip(*points, strict=True), "x", color="tab:purple", alpha=0.6, label="change of an adapted weight")
    ranks.set(title="Effective rank of the erasure's effect", ylabel="effective rank", ylim=(0, None))
    for axes in (probe, lens, norms, ranks):
        axes.set(xlabel="layer (0: embeddings)", xlim=(0, len(hidden["effective_rank"]) - 1))
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100)


def _curve(axes: Any, points: Sequence[Mapping[str, float]], colour: str, label: str) -> None:
    axes.plot([point["value"] for point in points], marker=".", color=colour, label=label)
    low, high = ([point[end] for point in points] for end in ("low", "high"))
    axes.fill_between(range(len(points)), low, high, color=colour, alpha=0.2, linewidth=0)


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
