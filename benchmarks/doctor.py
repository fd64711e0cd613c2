"""What `elm doctor` says of memory and time beside what `examples/erase.py` takes: `doctor_memory` and `doctor_time`."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, trainer
from transformers.utils import logging

from elm_trainer.modeling import DEMO_MODEL, load_tokenizer

from .report import Figure
from .shapes import ModelShape
from .workers import peak_bytes


logger = logging.get_logger(__name__)
ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "smollm2-135m-capitals-log-space.yaml"
# Models of random weights beside the demo's, and the layers of each at the depth of the demo's.
MODELS = {
    "30M": (ModelShape(hidden=384, intermediate=1024, layers=8, heads=6, kv_heads=2, vocab=49152), "3-6"),
    "135M": (None, "12-24"),
    "300M": (ModelShape(hidden=1024, intermediate=2816, layers=22, heads=16, kv_heads=8, vocab=49152), "9-18"),
}
SHORT = {"dataset_size": 48, "contrast_rows": 16, "max_steps": 6, "evaluate": "false"}


def measure_doctor(threads: int) -> dict[str, Any]:
    """Ask the doctor about the recipe in log space, made short, on three sizes of model, and run each right afterwards.

    Both are processes of their own with as many threads, one after the other. The figures are predicted / measured peak of memory,
    and seconds of a step, a round for each model.
    """
    models = {}
    for name, (shape, layers) in MODELS.items():
        with tempfile.TemporaryDirectory(prefix="elm-bench-") as folder:
            model = DEMO_MODEL if shape is None else _saved(shape, Path(folder) / "model")
            places = {
                "model": model,
                "lora_layers": layers,
                "output_dir": f"{folder}/out",
                "targets_dir": f"{folder}/t",
            }
            options = [f"--{key}={value}" for key, value in (SHORT | places).items()]
            said = _process("predict", options, threads)
            measured = _process("train", options, threads)
        models[name] = {
            "predicted_peak_bytes": said["peak"],
            "peak_bytes": measured["peak"],
            "memory_ratio": said["peak"] / measured["peak"],
            "predicted_step_seconds": said["step_seconds"],
            "step_seconds": measured["step_seconds"],
            "time_ratio": said["step_seconds"] / measured["step_seconds"],
            "doctor_seconds": said["took"],
            "predicted": said,
        }
        ratios = {kind: round(models[name][f"{kind}_ratio"], 3) for kind in ("memory", "time")}
        logger.info(f"{name}: predicted / measured {ratios}, in {said['took']:.1f} s")

    def figure(kind: str, what: str, off: float) -> dict[str, Any]:
        found = [model[f"{kind}_ratio"] for model in models.values()]
        meaning = f"{what}, `elm doctor` / `examples/erase.py`, one round for each model"
        return Figure(meaning, found, at_most=1 + off, at_least=1 - off, details={"models": models}).record()

    return {
        "doctor_memory": figure("memory", "peak memory of the process", 0.15),
        "doctor_time": figure("time", "seconds of a step", 0.4),
    }


def predict(options: list[str]) -> dict[str, Any]:
    """What the doctor says, and the seconds that this takes a process from its start."""
    began = time.perf_counter()
    from elm_trainer.cli.doctor import examine
    from elm_trainer.cli.erase_options import erasure_line
    from elm_trainer.cli.planned_run import DoctorArguments, PlannedRun

    run = PlannedRun(*erasure_line("doctor", options, own=DoctorArguments).complete())
    found = examine(run)
    if problems := {name: finding.text for name, finding in found.items() if finding.status == "problem"}:
        raise RuntimeError(f"The doctor sees problems: {problems}")
    return asdict(run.prediction) | {"peak": run.prediction.peak, "took": time.perf_counter() - began}


class _Steps(TrainerCallback):
    """Notes when a training begins and when its last step has ended."""

    began = seconds = 0.0
    steps = 0

    def on_train_begin(self, args, state, control, **kwargs):
        type(self).began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        type(self).seconds, type(self).steps = time.perf_counter() - self.began, state.global_step


def train(options: list[str]) -> dict[str, Any]:
    """Run `examples/erase.py`, and note its steps and its peak."""
    trainer.DEFAULT_CALLBACKS.append(_Steps)
    sys.argv = ["examples/erase.py", *options]
    runpy.run_path(str(ROOT / "examples" / "erase.py"), run_name="__main__")
    return {"step_seconds": _Steps.seconds / _Steps.steps, "peak": peak_bytes()}


def _saved(shape: ModelShape, folder: Path) -> str:
    tokenizer = load_tokenizer(DEMO_MODEL)
    torch.manual_seed(0)
    shape.model(tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _process(work: str, options: list[str], threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.doctor", work, f"--config={RECIPE}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps({"predict": predict, "train": train}[sys.argv[1]](sys.argv[2:])))  # noqa: T201
