"""Tables of an attack report, for the terminal and in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from ..labels import attack_label


HEADER = ("attack", "metric", "n", "reference", "unattacked", "attacked", "p", "brings back")

_METRICS = {"pmi": "ranked rightly, by PMI", "names_answer": "named in a free answer"}


def render_attacks(report: Mapping[str, Any]) -> Table:
    """The strongest variant of each attack, the strongest first, as a table that fits a terminal of 80 columns."""
    columns = (
        Column("attack", overflow="fold"),
        *(Column(name, no_wrap=True) for name in ("unattacked", "attacked", "back")),
    )
    table = Table(*columns, title="What attacks bring back (95 % intervals)", box=box.SIMPLE_HEAD, pad_edge=False)
    metric = ""
    for name, figure in sorted(strongest(report).items(), key=lambda item: _rank(item[1])):
        if figure["metric"] != metric:
            metric = figure["metric"]
            table.add_row(Text(_METRICS.get(metric, metric), style="bold"))
        sides = (_cell(figure[side]) for side in ("unattacked", "erased"))
        label = Padding(Text(attack_label(name, metric)), (0, 0, 0, 2))
        table.add_row(label, *sides, "yes" if figure["brings_back"] else "no")
    return table


def strongest(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of the strongest variant of each attack, beside those without an attack."""
    names = {best["name"] for family in report["families"].values() for best in family.values()}
    return {name: figure for name, figure in report["figures"].items() if name in names or figure["family"] == "none"}


def markdown_attacks(report: Mapping[str, Any]) -> str:
    """The report in Markdown: the worst case, the strongest variant of each attack, all figures, and what was skipped."""
    lines = ["# Attacks", "", "Share of questions answered rightly, with 95 % intervals. ", ""]
    for metric, worst in report["worst_case"].items():
        lines.append(
            f"- Worst case by `{metric}`: **{_cell(worst['erased'])}** under `{worst['name']}`, "
            f"{_cell(worst['plain'])} on the same questions unattacked."
        )
    lines += ["", "## The strongest variant of each attack", ""]
    lines += _markdown(strongest(report))
    lines += ["", "## All variants", "", *_markdown(report["figures"])]
    if report["skipped"]:
        lines += ["", "## Skipped", ""]
        lines += [f"- `{entry['name']}` {entry['settings']}: {entry['reason']}." for entry in report["skipped"]]
    return "\n".join(lines) + "\n"


def _markdown(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows: list[Sequence[str]] = [HEADER, ["---"] * len(HEADER), *attack_rows(figures)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def attack_rows(figures: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Figures of an attack report as text, in the order of `HEADER`, by metric and then by strength."""
    ranked = sorted(figures.items(), key=lambda item: _rank(item[1]))
    return [
        [
            name.removesuffix(f".{figure['metric']}"),
            figure["metric"],
            str(figure["erased"]["n"]),
            *(_cell(figure[side]) for side in ("reference", "unattacked", "erased")),
            f"{figure['p']:.3g}",
            "yes" if figure["brings_back"] else "no",
        ]
        for name, figure in ranked
    ]


def _rank(figure: Mapping[str, Any]) -> tuple[str, float]:
    """Place of a figure: by metric, and then by strength."""
    return figure["metric"], -figure["erased"]["value"]


def _cell(figure: Mapping[str, float] | None) -> str:
    return "–" if figure is None else f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"
