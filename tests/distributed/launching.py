"""Launch trainings as a user does, with the files in recipes/accelerate, and read what came of them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import run

from .train import Run


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "accelerate"
KINDS = ("ddp", "fsdp2", "zero2", "zero3")
# The environment of such a launch, beside one's own.
ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def _program(runs: Sequence[Run], output: Path) -> list[str]:
    output.mkdir(parents=True, exist_ok=True)
    plan = output / f"{runs[0].name}.plan.json"
    plan.write_text(json.dumps([made.as_json() for made in runs]))
    return ["-m", "tests.distributed.train", str(plan), str(output)]


def accelerate(kind: str, processes: int = 2) -> list[str]:
    """The command of a kind of launch, a file of recipes/accelerate by name, up to what it is to run."""
    if kind.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(RECIPES / f"{kind}.yaml")]
    return [*command, "--num_processes", str(processes), "--main_process_port", "0"]


def start(kind: str, runs: Sequence[Run], output: Path, processes: int = 2, **options: Any) -> subprocess.Popen:
    """Start the runs under a kind of launch."""
    command = [*accelerate(kind, processes), *_program(runs, output)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | ON_CPU, text=True, **options)


def launch(kind: str, runs: Sequence[Run], output: Path, processes: int = 2) -> dict[str, dict[str, Any]]:
    """Launch the runs, wait for them, and return their results by name.

    One process (`"single"`) is forked. The log of several is in `<first run>.log`.
    """
    if kind == "single":
        run([sys.executable, *_program(runs, output)], check=True)
    else:
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{runs[0].name}.log"
        with path.open("w") as log:
            status = start(kind, runs, output, processes, stdout=log, stderr=subprocess.STDOUT).wait(timeout=500)
        assert status == 0, path.read_text()[-6000:]
    return {made.name: json.loads((output / made.name / "result.json").read_text()) for made in runs}


def losses(result: dict[str, Any]) -> list[float]:
    assert "error" not in result, result["error"]
    return [entry["loss"] for entry in result["history"]]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")
