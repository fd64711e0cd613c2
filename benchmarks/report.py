"""The report of the benchmarks, `report.json`, and its picture."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any


SCHEMA_VERSION = 1
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")


def write_report(folder: str | Path, figures: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    """Write figures into `report.json`, beside those that an earlier run measured and this one did not.

    Args:
        folder (`str` or `Path`): Made if it does not exist.
        figures (`Mapping`): Records of [`Figure`] by key. Each was measured with its baseline in one run, and says where.
        settings (`Mapping`): What the run was asked for.

    Raises:
        ValueError: if the folder holds a report of another schema.
    """
    path = Path(folder) / "report.json"
    report = read_report(path) if path.exists() else {"schema_version": SCHEMA_VERSION}
    run = {"machine": machine(), "settings": dict(settings)}
    report |= {key: figure | run for key, figure in figures.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved, so that a full disk does not cost the figures of the earlier run.
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(report, indent=2), encoding="utf-8")
    os.replace(unfinished, path)
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
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figures = figures_of(report)
    canvas = Canvas(figsize=(10, 1.2 + 0.6 * len(figures)), layout="constrained")
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
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xlabel("ratio to the baseline, median and spread; the bar is the goal")
    canvas.savefig(path, dpi=100)
