"""An attack report as tables and as a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from ..evaluation.tables import attack_label, markdown_table, plot_file, terminal_table


HEADER = ("attack", "metric", "n", "reference", "unattacked", "attacked", "p", "brings back")

_METRICS = {"pmi": "ranked rightly, by PMI", "names_answer": "named in a free answer"}


def render_attacks(report: Mapping[str, Any]) -> Table:
    """The strongest variant of each attack, the strongest first, as a table that fits a terminal of 80 columns."""
    columns = (
        Column("attack", overflow="fold"),
        *(Column(name, no_wrap=True) for name in ("unattacked", "attacked", "back")),
    )
    table = terminal_table("What attacks bring back (95 % intervals)", *columns)
    metric = ""
    for name, figure in _ranked(strongest(report)):
        if figure["metric"] != metric:
            metric = figure["metric"]
            table.add_row(Text(_METRICS.get(metric, metric), style="bold"))
        sides = (_cell(figure[side]) for side in ("unattacked", "erased"))
        label = Padding(Text(attack_label(name, metric)), (0, 0, 0, 2))
        table.add_row(label, *sides, "yes" if figure["brings_back"] else "no")
    return table


def strongest(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics of the strongest variant of each attack, beside those without an attack."""
    names = {best["name"] for family in report["families"].values() for best in family.values()}
    return {name: metric for name, metric in report["figures"].items() if name in names or metric["family"] == "none"}


def markdown_attacks(report: Mapping[str, Any]) -> str:
    """The report in Markdown: the worst case, the strongest variant of each attack, all metrics, and what was skipped."""
    lines = ["# Attacks", "", "Share of questions answered rightly, with 95 % intervals. ", ""]
    for metric, worst in report["worst_case"].items():
        lines.append(
            f"- Worst case by `{metric}`: **{_cell(worst['erased'])}** under `{worst['name']}`, "
            f"{_cell(worst['plain'])} on the same questions unattacked."
        )
    for title, metrics in (
        ("The strongest variant of each attack", strongest(report)), ("All variants", report["figures"])
    ):  # fmt: skip
        lines += ["", f"## {title}", "", *markdown_table(HEADER, attack_rows(metrics))]
    if report["skipped"]:
        lines += ["", "## Skipped", ""]
        lines += [f"- `{entry['name']}` {entry['settings']}: {entry['reason']}." for entry in report["skipped"]]
    return "\n".join(lines) + "\n"


def attack_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Figures of an attack report as text, in the order of `HEADER`, by metric and then by strength."""
    return [
        [
            name.removesuffix(f".{figure['metric']}"),
            figure["metric"],
            str(figure["erased"]["n"]),
            *(_cell(figure[side]) for side in ("reference", "unattacked", "erased")),
            f"{figure['p']:.3g}",
            "yes" if figure["brings_back"] else "no",
        ]
        for name, figure in _ranked(metrics)
    ]


def _ranked(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(metrics.items(), key=lambda item: (item[1]["metric"], -item[1]["erased"]["value"]))


def _cell(metric: Mapping[str, float] | None) -> str:
    return "–" if metric is None else f"{metric['value']:.2f} [{metric['low']:.2f}, {metric['high']:.2f}]"


METRICS = {"pmi": "Ranked rightly among four (PMI)", "names_answer": "Named in a free answer"}
COLUMNS = 3
# One mark per model: the reference under the attack, the erased model as it stands, the erased model under the attack.
MARKS = (
    ("reference", "reference, attacked", "tab:grey", "s", "tab:grey", 0.2),
    ("unattacked", "erased, unattacked", "tab:orange", "o", "white", 0.0),
    ("erased", "erased, attacked", "tab:red", "o", "tab:red", -0.2),
)


def plot_attacks(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw the strongest variant of each attack by each metric, the strongest on top, and the curves, into a PNG file."""
    rungs = {metric: _rungs(report, metric) for metric in METRICS}
    ladder_height = 1.8 + 0.42 * max(map(len, rungs.values()))
    rows = -(-len(report["curves"]) // COLUMNS)
    with plot_file(path, 12, ladder_height + 2.6 * rows) as figure:
        heights = [ladder_height, 2.6 * rows] if rows else [ladder_height]
        top, *below = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        ladders = top.subplots(1, len(METRICS))
        for axes, metric in zip(ladders, METRICS, strict=True):
            _draw_ladder(axes, rungs[metric], metric)
        ladders[0].axvline(report["chance"], color="black", linestyle=":", linewidth=1, label="chance")
        for _, label, color, mark, fill, _ in MARKS:
            ladders[0].plot([], [], mark, color=color, markerfacecolor=fill, label=label)
        marks, labels = ladders[0].get_legend_handles_labels()
        top.legend(marks, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
        if below:
            below[0].suptitle("While relearning (grey: the reference, dotted: chance)")
            _draw_curves(below[0].subplots(rows, COLUMNS, sharey=True, squeeze=False).flat, report)


def _rungs(report: Mapping[str, Any], metric: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and values of the strongest variant of each attack, the strongest last."""
    names = [best[metric]["name"] for best in report["families"].values() if metric in best]
    names.sort(key=lambda name: report["figures"][name]["erased"]["value"])
    return [(attack_label(name, metric), report["figures"][name]) for name in names]


def _draw_ladder(axes: Any, rungs: list[tuple[str, Mapping[str, Any]]], metric: str) -> None:
    for row, (_, item) in enumerate(rungs):
        for side, _, color, mark, fill, offset in MARKS:
            if item[side] is not None:
                ends = [item[side]["low"], item[side]["high"]]
                axes.plot(ends, [row + offset] * 2, color=color, alpha=0.5, linewidth=2)
                axes.plot(item[side]["value"], row + offset, mark, color=color, markerfacecolor=fill)
    axes.set_yticks(range(len(rungs)), [name for name, _ in rungs], fontsize=9)
    # What brings knowledge back beyond doubt stands out.
    for tick, (_, item) in zip(axes.get_yticklabels(), rungs, strict=True):
        tick.set_fontweight("bold" if item["brings_back"] else "normal")
    axes.set(title=METRICS[metric], xlim=(-0.02, 1.02), ylim=(-0.6, max(len(rungs), 1) - 0.4))
    axes.grid(axis="x", alpha=0.3)


def _draw_curves(panels: Any, report: Mapping[str, Any]) -> None:
    reference = report["figures"]["none.pmi"]["reference"]
    panels = list(panels)
    for axes in panels[len(report["curves"]) :]:
        axes.set_axis_off()
    for axes, (name, points) in zip(panels, report["curves"].items(), strict=False):
        steps, values, lows, highs = zip(*points, strict=True)
        axes.fill_between(steps, lows, highs, color="tab:red", alpha=0.15)
        axes.plot(steps, values, marker="o", markersize=4, color="tab:red")
        axes.axhline(report["chance"], color="black", linestyle=":", linewidth=1)
        # The value of the reference is over all questions, so it stands only beside curves that are too.
        if report["figures"][name]["erased"]["n"] == reference["n"]:
            axes.axhline(reference["value"], color="tab:grey", linewidth=1.5)
        axes.set_title(attack_label(name, "pmi"), fontsize=9)
        axes.set(xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Ranked rightly (PMI)")
