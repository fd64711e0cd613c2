"""Erase once per value of a setting, and draw innocence against seamlessness and specificity.

`python examples/sweep.py --config recipes/smollm2-135m-capitals.yaml --setting state_eta --values 1 1.5 2`

Each run is one of examples/erase.py in a folder of its own; a value whose report exists is not run again.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from elm_trainer.cli import hush_libraries


@dataclass
class SweepArguments:
    config: str = field(metadata={"help": "Recipe of examples/erase.py."})
    setting: str = field(metadata={"help": "Field of the recipe that varies."})
    values: list[str] = field(metadata={"help": "Its values."})
    output_dir: str = field(default="outputs/sweep", metadata={"help": "Where the runs and pareto.png go."})


def main() -> None:
    [arguments] = HfArgumentParser(SweepArguments).parse_args_into_dataclasses()
    hush_libraries()
    # After the options are read, so that --help need not wait for torch.
    from elm_trainer import read_report
    from elm_trainer.evaluation.plots import plot_pareto

    reports = {}
    for value in arguments.values:
        folder = Path(arguments.output_dir) / f"{arguments.setting}-{value}"
        if not (folder / "report.json").exists():
            command = [sys.executable, str(Path(__file__).with_name("erase.py")), "--config", arguments.config]
            subprocess.run([*command, f"--{arguments.setting}={value}", f"--output_dir={folder}"], check=True)
        reports[f"{arguments.setting} {value}"] = read_report(folder / "report.json")
    plot_pareto(reports, Path(arguments.output_dir) / "pareto.png")


if __name__ == "__main__":
    main()
