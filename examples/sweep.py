"""Erase once per value of a setting, and draw innocence against seamlessness and specificity.

`python examples/sweep.py --config recipes/smollm2-135m-capitals.yaml --setting state_eta --values 1 1.5 2`

Each run is one of examples/erase.py in a folder of its own; a value whose report exists is not run again.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import HfArgumentParser

from elm_trainer.cli import hush_libraries
from elm_trainer.evaluation.tables import plot_file
from elm_trainer.evaluation.verdict import counts


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

    reports = {}
    for value in arguments.values:
        folder = Path(arguments.output_dir) / f"{arguments.setting}-{value}"
        if not (folder / "report.json").exists():
            command = [sys.executable, str(Path(__file__).with_name("erase.py")), "--config", arguments.config]
            subprocess.run([*command, f"--{arguments.setting}={value}", f"--output_dir={folder}"], check=True)
        reports[f"{arguments.setting} {value}"] = read_report(folder / "report.json")
    plot_pareto(reports, Path(arguments.output_dir) / "pareto.png")


def plot_pareto(reports: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw evaluation reports of the same reference, by name, into a PNG file.

    Left: mean PMI accuracy on the erased banks against the mean change on near and far banks; right: the same against
    R-PPL as a multiple of the reference's. Down and to the right, or down and to the left, is better.
    """
    with plot_file(path, 12, 5 + 0.2 * len(reports) / 4) as figure:
        kept, fluent = figure.subplots(1, 2)
        for index, (name, report) in enumerate(reports.items()):
            color, accuracy = f"C{index % 10}", _accuracy(report, "erased")
            for role, marker in (("near", "o"), ("far", "s")):
                if changes := [found["change"]["value"] for found in _ranked(report, role)]:
                    kept.plot(fmean(changes), accuracy, marker, color=color)
            change = report["figures"]["fluency.greedy.r_ppl"]["change"]
            fluent.plot([change["low"], change["high"]], [accuracy, accuracy], color=color, alpha=0.5)
            fluent.plot(change["value"], accuracy, "o", color=color, label=name)
        before = _accuracy(next(iter(reports.values())), "reference")
        for axes in (kept, fluent):
            axes.axhline(before, color="grey", linewidth=1, label="reference" if axes is fluent else None)
            axes.set(ylabel="concept ranked rightly (PMI)")
        kept.axvline(0, color="grey", linewidth=1)
        kept.set(xlabel="change of accuracy: near (circle), far (square)", title="Innocence and specificity")
        fluent.set(xlabel="R-PPL, as a multiple of the reference's", title="Innocence and seamlessness")
        # Beside the points names would lie upon each other.
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)


def _accuracy(report: Mapping[str, Any], side: str) -> float:
    """Mean over the ways of asking for the concept in which the reference knows the answers; over all if in none."""
    metrics = _ranked(report, "erased")
    return fmean(metric[side]["value"] for metric in list(filter(counts, metrics)) or metrics)


def _ranked(report: Mapping[str, Any], role: str) -> list[Mapping[str, Any]]:
    """PMI accuracy of each bank of a role; sets of benchmarks that are only answered freely have none."""
    names = [f"multiple_choice.{bank}.pmi" for bank, its in report["roles"].items() if its == role]
    return [report["figures"][name] for name in names if name in report["figures"]]


if __name__ == "__main__":
    main()
