"""Compare all methods on the same data: `python examples/compare.py --config recipes/compare-smollm2-135m.yaml`.

Writes `report.json`, `report.md` and `pareto.png` into `output_dir`; a stopped comparison continues where it stopped.
"""

from pathlib import Path

from rich.console import Console

from elm_trainer.scripts import help_at_once, hush_libraries


def main() -> None:
    help_at_once(None, "elm_trainer.comparison.ComparisonConfig")
    hush_libraries()
    from trl import TrlParser

    from elm_trainer.comparison import ComparisonConfig, compare_methods, markdown_comparison, render_comparison
    from elm_trainer.comparison.tables import plot_comparison
    from elm_trainer.files import write_text

    [config] = TrlParser((ComparisonConfig,)).parse_args_and_config()
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


if __name__ == "__main__":
    main()
