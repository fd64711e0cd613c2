"""What `python -m benchmarks --only gpu` measures, a part to a process: `python -m benchmarks.gpu_parts --part mistral-7b`.

Models have the shapes of well-known ones and random weights, which are made on the device: nothing is downloaded, and a step
takes as long as with trained ones. A part writes each row as soon as it is measured, so that one that is stopped keeps what
it had. On a CPU the same code runs with narrow models of three layers.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available, is_liger_kernel_available

from elm_trainer import ElmConfig
from elm_trainer.modeling import load_tokenizer

from .gpu_steps import Bench, Run
from .measured import rates
from .prediction import BITS4, Device
from .shapes import ModelShape
from .sides import cut_vocabulary, released_texts, tokenize


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "tests" / "recipes" / "configs"
# Of a card's name: operations a second in bf16 without sparsity, and bytes a second of its memory, by the data sheets. As in
# docs/scale.md, 40 % of the former are taken. The first name that a card's own begins with counts.
REACHED = 0.4
SHEETS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H100 NVL": (835e12, 3.9e12),
    "NVIDIA H100": (989e12, 3.35e12),
    "NVIDIA A100": (312e12, 2.0e12),
}


def narrowed(run: Run, name: str) -> PreTrainedConfig:
    """The config of a model that is stored for the tests, with the sizes of the run."""
    stored = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return AutoConfig.for_model(**stored | dict(run.sizes.narrow))


def random_model(run: Run, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of random weights in bf16, made where it is used."""
    torch.manual_seed(0)
    with torch.device(run.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def bench_of(run: Run, model: PreTrainedModel, weight_bytes: float = 2) -> Bench:
    """A bench for a model, and a row with the rates of the device that its predictions go by."""
    shape = ModelShape.of(model.config)
    tokenizer = cut_vocabulary(load_tokenizer(run.tokenizer), shape.vocab)
    sizes = run.sizes
    with tempfile.TemporaryDirectory(dir=run.folder) as folder:
        config = ElmConfig(
            folder, precompute_targets=False, max_length=sizes.text, bf16=False, use_cpu=True, report_to="none"
        )
        # Twelve characters to a token are more than any of these texts has.
        rows = tokenize(released_texts(sizes.samples, 12 * sizes.text), tokenizer, config)
    lengths = {len(row[name]) for row in rows for name in ("forget_ids", "retain_ids", "synthetic_ids")}
    if lengths != {sizes.text}:
        raise ValueError(f"The texts have {sorted(lengths)} tokens, where each is to have {sizes.text}.")
    measured = rates(shape, Bench(run, model, tokenizer, rows, Device(1, 1)).step(3), sizes.rating, run.device)
    sheet = sheet_of(torch.cuda.get_device_name()) if run.device == "cuda" else None
    run.add("rates", "measured" if sheet is None else "data sheet", measured=measured, sheet=sheet)
    device = (
        Device(measured["flops"], measured["bandwidth"]) if sheet is None else Device(REACHED * sheet[0], sheet[1])
    )
    return Bench(run, model, tokenizer, rows, device, weight_bytes)


def sheet_of(card: str) -> tuple[float, float] | None:
    """Operations and bytes a second by the data sheet of a card; none for one that is not in `SHEETS`."""
    return next((rate for name, rate in SHEETS.items() if card.startswith(name)), None)


def compare_steps(run: Run, name: str, methods: bool) -> None:
    """ELM beside fine-tuning at its fastest on a model of random weights, and the other methods where they are wanted."""
    bench = bench_of(run, random_model(run, narrowed(run, name)))
    flash = is_flash_attn_2_available() and run.device == "cuda"
    for attention in ["sdpa", *(["flash_attention_2"] if flash else [])]:
        bench.model.set_attn_implementation(attention)
        for step in (bench.elm, bench.sft):
            # What does not fit is tried with checkpointing; on a small model, that is to run once too.
            if not step(attention) or (run.size == "tiny" and methods):
                step(f"{attention}, checkpointing", checkpointing=True)
    if flash:
        bench.sft("flash_attention_2, padding-free", padding_free=True, max_length=None)
        bench.sft("flash_attention_2, packed", packed=4)
    if run.size == "tiny" and methods:
        bench.sft("sdpa, padding-free", padding_free=True, max_length=None)
        bench.sft("sdpa, packed", packed=3)
    if methods:
        bench.npo()
        bench.rmu()
    # Last, as Liger stays in the model.
    if is_liger_kernel_available() and run.device == "cuda":
        bench.sft("liger", use_liger_kernel=True)


def qlora(run: Run) -> None:
    """ELM on a base of four bits, where bitsandbytes is installed."""
    if not is_bitsandbytes_available():
        run.add("ELM", "4-bit base", skipped="bitsandbytes is not installed: `pip install 'elm-trainer[eval]'`")
        return
    config = narrowed(run, "mistral-7b")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    place = {"": 0 if run.device == "cuda" else "cpu"}  # accelerate wants the number of the card
    base = random_model(run, config)
    weights = base.state_dict()
    model = type(base).from_pretrained(
        None, config=config, state_dict=weights, quantization_config=four_bits, device_map=place,
        dtype=torch.bfloat16, attn_implementation="sdpa",
    )  # fmt: skip
    del base, weights
    bench_of(run, model, BITS4).elm("4-bit base")


def demo(run: Run) -> None:
    """The demo's recipe on the device: its seconds, and the share of questions answered before and after."""
    from elm_trainer.cli.erase import main

    options = {
        "config": str(ROOT / "recipes" / "smollm2-135m-capitals.yaml"),
        "use_cpu": str(run.device == "cpu").lower(),
        "bf16": "true",
        "output_dir": f"{run.folder}/demo",
        "targets_dir": f"{run.folder}/targets",
    } | dict(run.sizes.demo)
    if run.sizes.narrow:
        config = narrowed(run, "mistral-7b")
        tokenizer = load_tokenizer(run.tokenizer)
        config.vocab_size = len(tokenizer)
        for part in (random_model(run, config), tokenizer):
            part.save_pretrained(f"{run.folder}/model")
        options["model"] = f"{run.folder}/model"
    with run.attempt("demo"):
        began = time.perf_counter()
        main([word for name, value in options.items() for word in (f"--{name}", *value.split(" "))])
        took = time.perf_counter() - began
        report = json.loads(Path(options["output_dir"], "report.json").read_text(encoding="utf-8"))
        figures = {
            name: {side: figure[side]["value"] for side in ("reference", "erased")}
            for name, figure in report["figures"].items()
            if name.startswith(("families.", "multiple_choice.geography.", "cloze."))
        }
        run.add(
            "demo", "bf16", seconds=took, phases=report["seconds"], figures=figures,
            peak_bytes=report["peak_device_memory_bytes"],
        )  # fmt: skip


def marked_tests(run: Run, folder: str = "tests/gpu") -> None:
    """The tests of a folder that are marked `gpu`; on a CPU, those that run there."""
    found = Path(run.folder, "tests.xml")
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", folder, "-m", "gpu" if run.device == "cuda" else "not gpu", "-q",
            "-p", "no:cacheprovider", f"--junitxml={found}",
        ],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if not found.exists():
        raise RuntimeError(
            f"pytest ended with {done.returncode} before it ran a test:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    outcomes: dict[str, list[str]] = {"passed": [], "failure": [], "error": [], "skipped": []}
    for case in ElementTree.parse(found).iter("testcase"):
        [outcome] = {child.tag for child in case if child.tag in outcomes} or {"passed"}
        outcomes[outcome].append(str(case.get("name")))
    row: dict[str, Any] = {"passed": len(outcomes["passed"]), "skipped_tests": outcomes["skipped"]}
    if done.returncode or not outcomes["passed"]:
        failed = outcomes["failure"] + outcomes["error"]
        row |= {"error": f"pytest ended with {done.returncode}; failed: {failed}", "output": done.stdout[-8000:]}
    run.add("tests", folder, **row)


PARTS: dict[str, Callable[[Run], None]] = {
    "tests": marked_tests,
    "mistral-7b": lambda run: compare_steps(run, "mistral-7b", methods=True),
    "llama-3-8b": lambda run: compare_steps(run, "llama-3-8b-instruct", methods=False),
    "qlora": qlora,
    "demo": demo,
}


if __name__ == "__main__":
    [given] = HfArgumentParser(Run).parse_args_into_dataclasses()
    PARTS[given.part](given)
