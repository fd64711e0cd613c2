"""Tables of an attack report, for the terminal and in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


HEADER = ("attack", "metric", "n", "reference", "unattacked", "attacked", "p", "brings back")


def render_attacks(report: Mapping[str, Any]) -> Table:
    """All figures as a table for the terminal, the strongest attack first."""
    table = Table(*HEADER, title="What attacks bring back (95 % intervals)")
    for row in attack_rows(report["figures"]):
        table.add_row(*row)
    return table


def markdown_attacks(report: Mapping[str, Any]) -> str:
    """The report in Markdown: the worst case, the strongest variant of each attack, all figures, and what was skipped."""
    lines = ["# Attacks", "", "Share of questions answered rightly, with 95 % intervals. ", ""]
    for metric, worst in report["worst_case"].items():
        lines.append(
            f"- Worst case by `{metric}`: **{_cell(worst['erased'])}** under `{worst['name']}`, "
            f"{_cell(worst['plain'])} on the same questions unattacked."
        )
    strongest = {best["name"] for family in report["families"].values() for best in family.values()}
    figures = report["figures"]
    lines += ["", "## The strongest variant of each attack", ""]
    lines += _markdown({name: figures[name] for name in figures if name in strongest or name.startswith("none.")})
    lines += ["", "## All variants", "", *_markdown(figures)]
    if report["skipped"]:
        lines += ["", "## Skipped", ""]
        lines += [f"- `{entry['name']}` {entry['settings']}: {entry['reason']}." for entry in report["skipped"]]
    return "\n".join(lines) + "\n"


def _markdown(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows: list[Sequence[str]] = [HEADER, ["---"] * len(HEADER), *attack_rows(figures)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def attack_rows(figures: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Figures of an attack report as text, in the order of `HEADER`, by metric and then by strength."""
    ranked = sorted(figures.items(), key=lambda item: (item[1]["metric"], -item[1]["erased"]["value"]))
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


def _cell(figure: Mapping[str, float] | None) -> str:
    return "–" if figure is None else f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"
