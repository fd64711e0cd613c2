"""Say in a page what an erasure will do, take and stumble over, before anything heavy runs.

`elm doctor --recipe smollm2-135m-capitals`, or with any other options of `elm erase`; `elm doctor --model MODEL` alone shows
what suits a model. The exit code is 1 where the run would fail.
"""

import os
import sys
from typing import TYPE_CHECKING

from .erase_options import CommonSettings
from .options import CommandLine
from .planned_run import DoctorArguments, PlannedRun


if TYPE_CHECKING:
    from rich.console import Console

    from .findings import Finding

WIDTH = 80
_MARKS = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "problem": "[red]✗[/]"}


def show(run: PlannedRun, found: "dict[str, Finding]", console: "Console") -> None:
    """Print the page."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for name, (status, text, fix) in found.items():
        lines = [escape(text)] * bool(text) + [f"[dim]→ {escape(fix)}[/]"] * bool(fix)
        table.add_row(_MARKS[status], name, "\n".join(lines))
    console.print(table)
    if found["model"].status != "problem":
        fitted = Table("setting", "here", "suits", "because", box=None, padding=(0, 1, 0, 0), header_style="bold")
        for name, value in run.fitted.options().items():
            here = getattr(run.arguments, name, getattr(run.config, name, None))
            fitted.add_row(name, str(here), str(value), escape(run.fitted.reasons[name]))
        console.print(fitted)
    problems = [name for name, finding in found.items() if finding.status == "problem"]
    end = f"[red]The run would fail: {', '.join(problems)}.[/]" if problems else "[green]Nothing is in the way.[/]"
    console.print(end)


def main(argv: list[str] | None = None) -> None:
    line = CommandLine(
        "doctor", __doc__, argv, own=DoctorArguments, config="elm_trainer.ElmConfig", common=CommonSettings
    )
    line.early()
    from ..scripts import hush_libraries

    hush_libraries()
    from rich.console import Console
    from transformers.utils import logging

    logging.set_verbosity_error()
    arguments, config = line.complete()
    from .findings import examine

    run = PlannedRun(arguments, config)
    found = examine(run)
    console = Console(width=min(WIDTH, int(os.environ.get("COLUMNS", WIDTH))))
    show(run, found, console)
    if any(finding.status == "problem" for finding in found.values()):
        sys.exit(1)
