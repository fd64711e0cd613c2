"""Compare all methods on the same data: `elm compare --config recipes/compare-smollm2-135m.yaml`.

Writes `report.json`, `report.md` and `pareto.png` into `output_dir`; a stopped comparison continues where it stopped.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .options import CommandLine


@dataclass
class ComparisonSettings:
    """The fields of `ComparisonConfig`, as `--help` shows them without the seconds that its import takes."""

    output_dir: str = field(default="outputs/compare", metadata={"help": "Where the report goes."})
    model: str = field(default="smollm2-135m-instruct", metadata={"help": "Hub id, folder, GGUF file or demo model."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})
    concept: str = field(default="capitals", metadata={"help": "What is erased."})
    forget: str | None = field(default=None, metadata={"help": "Source of the forget text."})
    bank: str | None = field(default=None, metadata={"help": "Question bank of your own concept."})
    retain: list[str] = field(default_factory=lambda: ["everyday"], metadata={"help": "Retain sources."})
    synthetic: str | None = field(default=None, metadata={"help": "Source of synthetic pairs."})
    dataset_size: int = field(default=96, metadata={"help": "Rows of the dataset."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters."})
    lora_layers: str | None = field(default=None, metadata={"help": "First and last adapted layer, such as 6-21."})
    lora_targets: str = field(default="all-linear", metadata={"help": "Adapted modules, comma-separated."})
    training: dict[str, Any] = field(default_factory=dict, metadata={"help": "Training arguments of all methods."})
    updates: int = field(default=12, metadata={"help": "Updates of the search and of one table."})
    clock: str = field(default="elm", metadata={"help": "Method whose time is the budget of the other table."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the final runs."})
    search_seed: int = field(default=3, metadata={"help": "Seed of the search."})
    questions: int = field(default=40, metadata={"help": "Questions per bank of the test split."})
    dev_questions: int = field(default=24, metadata={"help": "Questions per bank of the dev split."})
    prompts: int = field(default=20, metadata={"help": "Prompts judged for fluency."})
    attack_questions: int = field(default=24, metadata={"help": "Questions under every attack."})
    ladder: str | None = field(default=None, metadata={"help": "YAML list of attacks."})
    methods: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of each method, in a file."})


def main(argv: list[str] | None = None) -> None:
    line = CommandLine(
        "compare", __doc__, argv, config="elm_trainer.comparison.ComparisonConfig", common=ComparisonSettings
    )
    # A value of the wrong type is found without torch, which takes seconds to load.
    line.early()
    from . import hush_libraries

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
