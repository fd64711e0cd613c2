"""Plots of evaluation reports, as PNG files drawn from the JSON alone."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from ..files import replacing
from .tables import NOT_MEASURED, metric_label
from .verdict import CRITERIA, counts, read_verdict, split_name


# A term of the loss on training rows; `train_loss` is the mean of the whole loss over the run.
_TERM = re.compile(r"(?!eval_|train_)\w+_loss")
_COLORS = {"reference": "C0", "erased": "C3"}
_INSIDE_COLORS = {"reference": "tab:grey", "erased": "tab:orange"}
_ROW_INCHES = 0.25
# Where accuracy is to be kept, more is better; of all else, less.
_TO_BE_KEPT = ("near", "far")


@contextmanager
def plot_file(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on, which is written into a PNG file once the block has ended."""
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100)


def plot_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw what each criterion is judged by, before and after, and the loss terms where known, into a PNG file.

    One panel for each criterion, one line for each metric: a dot for the reference, one for the erased model, their 95 %
    intervals, and chance as a tick. Perplexities stand as multiples of the reference's. Lines that the verdict does not
    count are gray. An arrow beside each label points to the better side.
    """
    lines = _lines(report)
    # Innocence has the left column; beside it the others, each as high as its lines need.
    rows = [max(len(lines["seamlessness"]), 3), max(len(lines["specificity"]), 3), 6]
    height = 2.4 + _ROW_INCHES * max(len(lines["innocence"]), sum(rows) + 6)
    with plot_file(path, 12, height) as figure:
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
        for term in dict.fromkeys(key for entry in log for key in entry if _TERM.fullmatch(key)):
            points = [(entry["step"], entry[term]) for entry in log if term in entry]
            losses.plot(*zip(*points, strict=True), label=term.removesuffix("_loss"))
        losses.set(title="Loss terms", xlabel="step", yscale="log")
        if losses.lines:
            losses.legend(fontsize=8)


def _lines(report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By criterion, the metrics that belong in its panel, and the label of each."""
    found: dict[str, dict[str, str]] = {name: {} for name in CRITERIA}
    for name, metric in report["figures"].items():
        kind, bank, rule = split_name(name)
        role = report["roles"].get(bank)
        _, measured = metric_label(name, report["roles"])
        if kind == "multiple_choice" and rule == "pmi":
            criterion = "specificity" if role in _TO_BE_KEPT else "innocence"
            label = f"{bank} ({role}), ranked by PMI"
        elif kind in ("open_answers", "cloze") and role in ("erased", "unseen") and rule in ("", "commonest"):
            criterion, label = "innocence", f"{bank}, {measured}"
        elif kind == "fluency" and metric["statistic"] in ("mean", "perplexity"):
            criterion, label = "seamlessness", measured
        elif name == "retention.perplexity":
            criterion, label = "specificity", "unrelated text, perplexity"
        else:
            continue
        multiple = ", × reference" if metric["statistic"] == "perplexity" else ""
        found[criterion][name] = f"{label}{multiple} {'→' if role in _TO_BE_KEPT else '←'}"
    return found


def _dots(axes: Any, report: Mapping[str, Any], lines: Mapping[str, str]) -> None:
    for row, name in enumerate(lines):
        figure = report["figures"][name]
        multiples = {"reference": dict.fromkeys(("value", "low", "high"), 1.0), "erased": figure["change"]}
        sides = multiples if figure["statistic"] == "perplexity" else figure
        for offset, (side, usual) in zip((0.14, -0.14), _COLORS.items(), strict=True):
            value, low, high = (sides[side][key] for key in ("value", "low", "high"))
            color = usual if counts(figure) else "lightgray"
            axes.plot([low, high], [row - offset] * 2, color=color, linewidth=1, alpha=0.6)
            axes.plot(value, row - offset, "o", color=color, markersize=4, label=side if row == 0 else None)
        if name.startswith("multiple_choice."):
            # Reports of an earlier version hold it among the shortcuts alone.
            chance = figure.get("chance", report["shortcuts"].get(split_name(name)[1], {}).get("chance"))
            if chance is not None:
                label = "chance" if row == 0 else None
                axes.plot([chance] * 2, [row - 0.4, row + 0.4], "k--", linewidth=1, label=label)
    axes.set_yticks(range(len(lines)), list(lines.values()), fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)


def plot_inside(inside: Mapping[str, Any], path: str | Path) -> None:
    """Draw what [`~elm_trainer.evaluation.inside.look_inside`] returns, four panels over the layers, into a PNG file."""
    with plot_file(path, 12, 9) as figure:
        (probe, lens), (norms, ranks) = figure.subplots(2, 2)
        for side, color in _INSIDE_COLORS.items():
            _curve(probe, inside["probe"][side]["accuracy"], color, side)
            control = [point["value"] for point in inside["probe"][side]["control"]]
            probe.plot(control, linestyle=":", color=color, label=f"{side}, labels shuffled")
            _curve(lens, inside["logit_lens"][side]["accuracy"], color, side)
        probe.axhline(0.5, color="black", linestyle="--", linewidth=1, label="chance")
        probe.set(title="Linear probe: is the statement true?", ylabel="accuracy", ylim=(0.3, 1.02))
        lens.axhline(inside["logit_lens"]["chance"], color="black", linestyle="--", linewidth=1, label="chance")
        lens.set(title="Logit lens: the right option's first token leads", ylabel="accuracy", ylim=(0, 1.02))
        for text, color in (("forget", "tab:red"), ("retain", "tab:blue")):
            _curve(norms, inside["norms"][text]["ratio"], color, f"{text} text")
        norms.axhline(1, color="black", linestyle="--", linewidth=1)
        norms.set(title="Size of the hidden states", ylabel="L2 norm, erased / reference")
        norms.ticklabel_format(axis="y", useOffset=False)
        hidden = inside["effect_rank"]["hidden"]
        label = f"change of hidden states ({hidden['tokens']} tokens)"
        ranks.plot(hidden["effective_rank"], marker=".", color="tab:green", label=label)
        # The state behind a layer comes after the embeddings' and so has the next number.
        points = [
            (weight["layer"] + 1, weight["effective_rank"])
            for weight in inside["effect_rank"]["weights"] or []
            if weight["layer"] is not None
        ]
        if points:
            label = "change of an adapted weight"
            ranks.plot(*zip(*points, strict=True), "x", color="tab:purple", alpha=0.6, label=label)
        ranks.set(title="Effective rank of the erasure's effect", ylabel="effective rank", ylim=(0, None))
        for axes in (probe, lens, norms, ranks):
            axes.set(xlabel="layer (0: embeddings)", xlim=(0, len(hidden["effective_rank"]) - 1))
            axes.grid(alpha=0.2)
            axes.legend(fontsize=8)


def _curve(axes: Any, points: Sequence[Mapping[str, float]], color: str, label: str) -> None:
    values, low, high = ([point[key] for point in points] for key in ("value", "low", "high"))
    axes.plot(values, marker=".", color=color, label=label)
    axes.fill_between(range(len(points)), low, high, color=color, alpha=0.2, linewidth=0)


def plot_pareto(reports: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw evaluation reports of the same reference, by name, into a PNG file.

    Left: mean PMI accuracy on the erased banks against the mean change on near and far banks; right: the same against
    R-PPL as a multiple of the reference's. Down and to the right, or down and to the left, is better.
    """
    with plot_file(path, 12, 5 + 0.2 * len(reports) / 4) as figure:
        kept, fluent = figure.subplots(1, 2)
        for index, (name, report) in enumerate(reports.items()):
            color, accuracy = f"C{index % 10}", _accuracy(report, "erased")
            for role, marker in (("near", "o"), ("far", "s")):
                if changes := [found["change"]["value"] for found in _ranked(report, role)]:
                    kept.plot(fmean(changes), accuracy, marker, color=color)
            change = report["figures"]["fluency.greedy.r_ppl"]["change"]
            fluent.plot([change["low"], change["high"]], [accuracy, accuracy], color=color, alpha=0.5)
            fluent.plot(change["value"], accuracy, "o", color=color, label=name)
        before = _accuracy(next(iter(reports.values())), "reference")
        for axes in (kept, fluent):
            axes.axhline(before, color="grey", linewidth=1, label="reference" if axes is fluent else None)
            axes.set(ylabel="concept ranked rightly (PMI)")
        kept.axvline(0, color="grey", linewidth=1)
        kept.set(xlabel="change of accuracy: near (circle), far (square)", title="Innocence and specificity")
        fluent.set(xlabel="R-PPL, as a multiple of the reference's", title="Innocence and seamlessness")
        # Beside the points names would lie upon each other.
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)


def _accuracy(report: Mapping[str, Any], side: str) -> float:
    """Mean over the ways of asking for the concept in which the reference knows the answers; over all if in none."""
    metrics = _ranked(report, "erased")
    return fmean(metric[side]["value"] for metric in list(filter(counts, metrics)) or metrics)


def _ranked(report: Mapping[str, Any], role: str) -> list[Mapping[str, Any]]:
    """PMI accuracy of each bank of a role; sets of benchmarks that are only answered freely have none."""
    names = [f"multiple_choice.{bank}.pmi" for bank, its in report["roles"].items() if its == role]
    return [report["figures"][name] for name in names if name in report["figures"]]
