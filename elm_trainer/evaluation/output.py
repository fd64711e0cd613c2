"""Everything an evaluation leaves on disk and in the terminal, made from the report alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from .plots import plot_inside, plot_report
from .tables import render_table, render_verdict, write_markdown, write_samples


def write_evaluation(output_dir: str | Path, report: Mapping[str, Any]) -> None:
    """Write `report.md`, `report.png`, `samples.md` and, where it was measured, `inside.png`; print the tables."""
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_markdown(output / "report.md", report)
    write_samples(output / "samples.md", report)
    plot_report(report, output / "report.png")
    if report["inside"] is not None:
        plot_inside(report["inside"], output / "inside.png")
    console = Console()
    console.print(render_table(report))
    console.print(render_verdict(report))
