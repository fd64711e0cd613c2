"""Compare all methods on the same data: `elm compare --config recipes/compare-smollm2-135m.yaml`.

Writes `report.json`, `report.md` and `pareto.png` into `output_dir`; a stopped comparison continues where it stopped.
"""

from pathlib import Path

from ..checks import ComparisonFields
from . import hush_libraries
from .options import CommandLine


def main(argv: list[str] | None = None) -> None:
    line = CommandLine(
        "compare", __doc__, argv, config="elm_trainer.comparison.ComparisonConfig", common=ComparisonFields
    )
    # A value of the wrong type is found without torch, which takes seconds to load.
    line.early()
    hush_libraries()
    from rich.console import Console

    from ..comparison import compare_methods, markdown_comparison, render_comparison
    from ..comparison.tables import plot_comparison
    from ..files import write_text

    [config] = line.complete()
    report = compare_methods(config)
    output = Path(config.output_dir)
    write_text(output / "report.md", markdown_comparison(report))
    plot_comparison(report, output / "pareto.png")
    console = Console()
    for table in render_comparison(report):
        console.print(table)
    console.print(
        f"{sum(report['seconds'].values()):.0f} s, peak {report['peak_memory_bytes'] / 1e9:.1f} GB. "
        f"See {output}: report.md, report.json and pareto.png."
    )
