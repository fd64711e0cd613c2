"""Everything an evaluation leaves on disk and in the terminal, made from the report alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .plots import plot_inside, plot_report
from .tables import render_summary, verdict_lines, write_markdown, write_samples


def write_evaluation(output_dir: str | Path, report: Mapping[str, Any]) -> None:
    """Write `report.md`, `report.png`, `samples.md` and, where it was measured, `inside.png`; print a summary."""
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_markdown(output / "report.md", report)
    write_samples(output / "samples.md", report)
    plot_report(report, output / "report.png")
    if report["inside"] is not None:
        plot_inside(report["inside"], output / "inside.png")
    # Only the states are styled: a report's own words are no markup.
    console = Console(highlight=False, markup=False)
    for state, why in verdict_lines(report):
        console.print(Text.assemble((state, "bold"), f" {why}"))
    for flag in report["flags"]:
        console.print(Text.assemble((f"{flag['flag']}:", "bold"), f" {flag['why']}"))
    console.print(render_summary(report))
