"""The report of the benchmarks, `report.json`, and its picture; a figure of it is the ratio of two sides, and what it should be."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any

from elm_trainer.files import write_json


SCHEMA_VERSION = 1
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class Figure:
    """A ratio that was measured in several rounds."""

    meaning: str  # what is divided by what
    rounds: Sequence[float]
    at_most: float | None = None  # what the median should not exceed
    at_least: float | None = None  # what it should reach
    bound: bool = False  # whether the true ratio is only known to be at least this large
    details: dict[str, Any] = field(default_factory=dict)  # what the rounds measured, for the report

    def record(self) -> dict[str, Any]:
        """The figure as it stands in the report."""
        value = statistics.median(self.rounds)
        met = (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)
        return {
            "meaning": self.meaning,
            "value": value,
            "spread": [min(self.rounds), max(self.rounds)],
            "rounds": list(self.rounds),
            "at_most": self.at_most,
            "at_least": self.at_least,
            "met": met,
            "bound": self.bound,
            **self.details,
        }


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Ratio of two sides in each round; a round's sides ran right after one another."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]


def seconds_in_turns(
    sides: Mapping[str, Callable[[], object]], repeats: int, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of a call of each side, a mean over `calls` in each of so many rounds, after one call that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            for _ in range(calls):
                side()
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each side's rounds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def write_report(folder: str | Path, figures: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    """Write records of [`Figure`] into `report.json`, beside those that an earlier run measured and this one did not.

    Each was measured with its baseline in one run, and says where and with what settings.

    Raises:
        ValueError: if the folder holds a report of another schema.
    """
    path = Path(folder) / "report.json"
    report = read_report(path) if path.exists() else {"schema_version": SCHEMA_VERSION}
    run = {"machine": machine(), "settings": dict(settings)}
    report |= {key: figure | run for key, figure in figures.items()}
    write_json(path, report)
    return path


def read_report(path: str | Path) -> dict[str, Any]:
    """Read `report.json`; raises `ValueError` for one of another schema."""
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    if report.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"`schema_version` of {path} is {report.get('schema_version')!r}, and {SCHEMA_VERSION} is read here: name "
            "another `output_dir`."
        )
    return report


def figures_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a report by key."""
    return {key: figure for key, figure in report.items() if isinstance(figure, Mapping)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"device": device, "processor": platform.machine(), "cores": os.cpu_count(), "libraries": libraries}


def draw(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw every figure's median with its spread, beside what it should be."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    from elm_trainer.evaluation.tables import plot_file

    figures = figures_of(report)
    with plot_file(path, 10, 1.2 + 0.6 * len(figures)) as canvas:
        axes = canvas.add_subplot()
        for place, figure in enumerate(figures.values()):
            low, high = figure["spread"]
            color = "tab:blue" if figure["met"] else "tab:red"
            axes.plot([low, high], [place, place], color=color, linewidth=3, alpha=0.4)
            # An arrow where the true ratio is at least as large.
            axes.plot(figure["value"], place, marker=">" if figure["bound"] else "o", color=color)
            # Beside the axes, where no goal's bar can cross it.
            axes.text(1.01, place, f"{figure['value']:.2f}", transform=axes.get_yaxis_transform(), va="center")
            for goal in (figure["at_most"], figure["at_least"]):
                if goal is not None:
                    axes.plot([goal, goal], [place - 0.3, place + 0.3], color="black", linewidth=1)
        axes.set_yticks(range(len(figures)), [fill(figure["meaning"], 44) for figure in figures.values()], fontsize=9)
        axes.set_ylim(len(figures) - 0.4, -0.6)
        axes.set_xscale("log")
        # Labels by halves and doubles: those of the decades' parts would lie upon each other.
        axes.xaxis.set_major_locator(LogLocator(base=2))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1, color="gray", linewidth=0.8, linestyle=":")
        axes.set_xlabel("ratio to the baseline, median and spread; the bar is the goal")
