"""`make gpu`: the tests marked `gpu`, then steps of large models beside their prediction, in one `gpu.json`.

Each part is a process of its own with a time limit, so that one that fails, hangs or fills the card leaves the others as they
are; together they keep to nine minutes. What a part does stands in `gpu_parts`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from elm_trainer.files import write_json

from .report import machine


ROOT = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1
# Seconds that each part has at most.
LIMITS = {"tests": 90, "mistral-7b": 160, "llama-3-8b": 120, "qlora": 70, "demo": 80}
_OPTIONAL = ("bitsandbytes", "flash_attn", "liger_kernel", "triton", "datasets")


def measure_gpu(folder: Path, device: str, size: str, parts: Sequence[str]) -> dict[str, Any]:
    """Run parts one after the other, and write `gpu.json` after each; it is `complete` where none failed or was stopped.

    Raises:
        ValueError: if there is no such device.
    """
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "card": card(device),
        "machine": machine() | {"further": {name: _version(name) for name in _OPTIONAL}},
        "commit": _output("git", "rev-parse", "HEAD"),
        "device": device,
        "size": size,
        "parts": {},
    }
    for name in parts:
        part = run_part(name, device, size, LIMITS[name])
        report["parts"][name] = part
        report["summary"] = summary(report["parts"])
        report["complete"] = len(report["parts"]) == len(parts) and all(map(went_well, report["parts"].values()))
        write_json(folder / "gpu.json", report)
        print(_lines(name, part), flush=True)  # noqa: T201
    return report


def run_part(name: str, device: str, size: str, limit: float, command: Sequence[str] = ()) -> dict[str, Any]:
    """Run a part in a process of its own, which is ended with all that it has started when its `limit` of seconds is over.

    Returns:
        `dict[str, Any]`: its `status` (`"done"`, `"failed"`, `"stopped"`), `seconds`, `limit`, and the `rows` that it wrote;
        of one that did not end well also the end of its `output`.
    """
    folder = tempfile.mkdtemp(prefix="elm-gpu-")
    command = command or [sys.executable, "-m", "benchmarks.gpu_parts", "--part", name]
    command = [*command, "--device", device, "--size", size, "--folder", folder]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",  # nothing is downloaded
        "HF_DATASETS_CACHE": f"{folder}/datasets",
        "TOKENIZERS_PARALLELISM": "false",
        # Nothing here uses DeepSpeed, but where it is installed accelerate imports it, and then it looks for a CUDA compiler.
        "DS_ACCELERATOR": "cpu",
        # One device: the others would be used side by side.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if device == "cuda" else "",
    }
    began = time.perf_counter()
    try:
        with open(Path(folder, "output.txt"), "w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=limit)
                status = "failed" if code else "done"
            except subprocess.TimeoutExpired:
                status = "stopped"
            finally:
                _end(process)
        part: dict[str, Any] = {"status": status, "seconds": time.perf_counter() - began, "limit": limit}
        rows = Path(folder, "rows.jsonl")
        # The last line of a part that was stopped may be half of one.
        lines = rows.read_text(encoding="utf-8").split("\n")[:-1] if rows.exists() else []
        part["rows"] = [json.loads(line) for line in lines]
        if not went_well(part):
            part["output"] = Path(folder, "output.txt").read_text(encoding="utf-8", errors="replace")[-6000:]
        return part
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: subprocess.Popen) -> None:
    """End a part, with the processes of its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended
    process.wait()


def went_well(part: Mapping[str, Any]) -> bool:
    """Whether a part ran to its end and nothing in it failed, but for settings too large for the card beside one that was not."""
    measured = {row["name"] for row in part["rows"] if "seconds" in row}
    failed = [row for row in part["rows"] if "error" in row]
    too_large = [row for row in failed if row["error"].startswith("OutOfMemoryError") and row["name"] in measured]
    return part["status"] == "done" and bool(part["rows"]) and len(failed) == len(too_large)


def fastest(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """The row of fewest seconds among those of a name; none where none was measured."""
    measured = [row for row in rows if row["name"] == name and "seconds" in row]
    return min(measured, key=lambda row: row["seconds"], default=None)


def summary(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By part: seconds of the fastest ELM step / those of the fastest fine-tuning, and its peak of memory / the prediction."""
    found: dict[str, dict[str, float]] = {}
    for name, part in parts.items():
        elm, sft = (fastest(part["rows"], trainer) for trainer in ("ELM", "SFT"))
        if elm is not None:
            found[name] = {"memory_vs_prediction": elm["peak_bytes"] / elm["predicted_bytes"]}
            if sft is not None:
                found[name]["step_vs_sft"] = elm["seconds"] / sft["seconds"]
    return found


def card(device: str) -> dict[str, Any]:
    """Name, memory and driver of the device.

    Raises:
        ValueError: if there is no such device.
    """
    import torch

    if device == "cpu":
        return {"name": "cpu"}
    if not torch.cuda.is_available():
        raise ValueError(
            "`device` is 'cuda', but torch sees no such device: install its driver and a torch built for it, or run the "
            "same code with `--device cpu --size tiny`."
        )
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": [properties.major, properties.minor],
        "processors": properties.multi_processor_count,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cards": torch.cuda.device_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """First line of what a command says; none where it is not installed or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _lines(name: str, part: Mapping[str, Any]) -> str:
    """A part in words."""
    lines = [f"{name}: {part['status']} in {part['seconds']:.0f} of {part['limit']:.0f} s"]
    for row in part["rows"]:
        title = ", ".join(filter(None, (row["name"], row["setting"])))
        if "error" in row:
            lines.append(f"  {title}: {row['error'][:300]}")
        elif "skipped" in row:
            lines.append(f"  {title}: left out, {row['skipped']}")
        elif "predicted_seconds" in row:
            lines.append(f"  {title}: " + _measured(row))
        elif "passed" in row:
            lines.append(f"  {title}: {row['passed']} passed, {len(row['skipped_tests'])} skipped")
        elif "seconds" in row:
            lines.append(f"  {title}: {row['seconds']:.0f} s")
    return "\n".join(lines)


def _measured(row: Mapping[str, Any]) -> str:
    seconds = f"{row['predicted_seconds']:.3f} / {row['seconds']:.3f} s"
    if "predicted_bytes" not in row:
        return f"{seconds}, – / {row['peak_bytes'] / 1e9:.1f} GB"
    return f"{seconds}, {row['predicted_bytes'] / 1e9:.1f} / {row['peak_bytes'] / 1e9:.1f} GB"


def page_table(path: Path) -> str:
    """What docs/scale.md says of a committed `gpu.json`: a table of predicted / measured, or that none was run."""
    if not path.exists():
        return "**None was run so far**: there is no `docs/gpu.json`."
    report = json.loads(path.read_text(encoding="utf-8"))
    if report.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"`schema_version` of {path} is {report.get('schema_version')!r}, and {SCHEMA_VERSION} is read here: measure "
            "again with `make gpu`."
        )
    facts, libraries = report["card"], report["machine"]["libraries"]
    lines = [
        f"On one {facts['name']} (driver {facts.get('driver')}, torch {libraries['torch']}), at commit "
        f"`{str(report['commit'])[:7]}`:",
        "",
        "| model | what | seconds of an update, predicted / measured | peak of memory, predicted / measured |",
        "| --- | --- | --- | --- |",
    ]
    for name, part in report["parts"].items():
        for row in part["rows"]:
            title = ", ".join(filter(None, (row["name"], row["setting"])))
            if "predicted_seconds" in row:
                lines.append(f"| {name} | {title} | " + _measured(row).replace(", ", " | ") + " |")
            elif "error" in row and row["name"] != "tests":
                lines.append(f"| {name} | {title} | failed: {row['error'].split(':')[0]} | – |")
            elif "skipped" in row:
                lines.append(f"| {name} | {title} | left out: {row['skipped']} | – |")
        if part["status"] != "done":
            lines.append(f"| {name} | {part['status']} after {part['seconds']:.0f} s | – | – |")
    lines += [""]
    for name, ratios in report["summary"].items():
        said = f"{name}: peak of memory / prediction {ratios['memory_vs_prediction']:.2f}"
        if "step_vs_sft" in ratios:
            said += f", ELM / the fastest fine-tuning {ratios['step_vs_sft']:.2f}"
        lines.append(f"- {said}")
    return "\n".join(lines)
