"""Measure speed and memory, and write `report.json` and `report.png`.

```shell
python -m benchmarks                           # all that need no minutes of the real model
python -m benchmarks --only growth --repeats 7
python -m benchmarks --only doctor --threads 1
python -m benchmarks --only time_to_quality --budget 2400
python -m benchmarks --only gpu                # `make gpu`: on a card, into gpu.json
python -m benchmarks --only gpu --device cpu --size tiny
```
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.utils import logging

from elm_trainer.checks import check_numbers

from .doctor import measure_doctor
from .gpu import LIMITS, measure_gpu
from .measured import measure_prediction
from .packing import measure_packing
from .quality import measure_quality
from .report import draw, figures_of, read_report, write_report
from .step import REAL, REAL_SIZES, measure_growth, measure_step
from .targets import measure_live_targets, measure_sharing, measure_target_precision


@dataclass
class BenchmarkArguments:
    """What is measured. Figures that are in `output_dir` and are not measured again are kept."""

    # The others run the real model for minutes, or need a card: they are measured only where they are named.
    only: list[str] = field(
        default_factory=lambda: ["step", "growth", "prediction", "doctor", "packing"],
        metadata={
            "help": "step, growth, growth_real, prediction, doctor, packing, live_targets, sharing, target_precision, time_to_quality, "
            "gpu."
        },
    )
    output_dir: str = field(default="outputs/bench", metadata={"help": "Where the report goes."})
    repeats: int = field(default=5, metadata={"help": "Rounds in which the sides take turns."})
    threads: int = field(default=2, metadata={"help": "Threads of every side."})
    budget: float = field(default=1800.0, metadata={"help": "Seconds of the released loop in time_to_quality."})

    device: str = field(default="cuda", metadata={"help": "Device of gpu.", "choices": ["cuda", "cpu"]})
    size: str = field(default="full", metadata={"help": "Models of gpu.", "choices": ["full", "tiny"]})
    parts: list[str] = field(
        default_factory=lambda: [*LIMITS], metadata={"help": f"Parts of gpu: {', '.join(LIMITS)}."}
    )

    def __post_init__(self):
        for name, known in (("only", [*SECTIONS, GPU]), ("parts", [*LIMITS])):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ValueError(f"`{name}` names {unknown}, which do not exist; use: {', '.join(known)}.")
        check_numbers(self, [("above 0", ("repeats", "threads", "budget"))])


# Beside the sections, as it has a report of its own.
GPU = "gpu"
SECTIONS: dict[str, Callable[[BenchmarkArguments], dict[str, Any]]] = {
    "step": lambda arguments: measure_step(arguments.repeats, arguments.threads),
    "growth": lambda arguments: {"growth": measure_growth(arguments.repeats, arguments.threads)},
    "growth_real": lambda arguments: {
        "growth_real": measure_growth(arguments.repeats, arguments.threads, REAL, REAL_SIZES)
    },
    "prediction": lambda arguments: {"prediction": measure_prediction(arguments.repeats, arguments.threads)},
    "doctor": lambda arguments: measure_doctor(arguments.threads),
    "packing": lambda arguments: measure_packing(arguments.repeats, arguments.threads),
    "live_targets": lambda arguments: measure_live_targets(arguments.repeats, arguments.threads),
    "sharing": lambda arguments: measure_sharing(arguments.repeats, arguments.threads),
    "target_precision": lambda arguments: measure_target_precision(arguments.threads),
    "time_to_quality": lambda arguments: {
        "time_to_quality_vs_released": measure_quality(arguments.threads, arguments.budget)
    },
}


def main(arguments: BenchmarkArguments) -> None:
    folder = Path(arguments.output_dir)
    if (folder / "report.json").exists():
        read_report(folder / "report.json")  # of another schema: better said now than after the measurements
    settings = {"repeats": arguments.repeats, "threads": arguments.threads}
    complete = True
    for section in arguments.only:
        if section == GPU:
            complete = measure_gpu(folder, arguments.device, arguments.size, arguments.parts)["complete"]
            continue
        figures = SECTIONS[section](arguments)
        # After each section, so that a later one that fails costs nothing.
        report = read_report(write_report(folder, figures, settings))
        draw(report, folder / "report.png")
        for key in figures:
            figure = figures_of(report)[key]
            low, high = figure["spread"]
            goals = [
                f"{word} {figure[k]}" for k, word in (("at_most", "≤"), ("at_least", "≥")) if figure[k] is not None
            ]
            sign = "≥ " if figure["bound"] else ""
            print(f"{key:28} {sign}{figure['value']:.3f} ({low:.3f} to {high:.3f})  {', '.join(goals)}")  # noqa: T201
    if not complete:
        raise SystemExit(f"Some of it failed: see {folder / 'gpu.json'}.")


if __name__ == "__main__":
    logging.set_verbosity_info()
    [parsed] = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    main(parsed)
