"""`make gpu` on a CPU: the same code with narrow models, part by part in this process; and what guards the parts."""

import gc
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import BenchmarkArguments, main
from benchmarks.gpu import LIMITS, fastest, measure_gpu, page_table, run_part, summary, went_well
from benchmarks.gpu_parts import PARTS, marked_tests, narrowed, sheet_of
from benchmarks.gpu_steps import SIZES, Run
from benchmarks.prediction import ADAPTERS, MODELS, SAMPLES, TEXT
from benchmarks.shapes import ModelShape
from benchmarks.sides import cut_vocabulary


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """A bench collects garbage before every training, which need not search what the imports left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def run(tmp_path, saved_tokenizer):
    """Makes a part that runs in this process, on the CPU and small."""
    return lambda part: Run(part, str(tmp_path), device="cpu", size="tiny", tokenizer=saved_tokenizer)


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "rows.jsonl").read_text().splitlines()]


def test_the_full_size_is_that_of_the_predictions(tmp_path):
    full, run = SIZES["full"], Run("mistral-7b", str(tmp_path))
    assert (full.batch, full.text, full.adapter) == (SAMPLES, TEXT, ADAPTERS["7B"])
    assert ModelShape.of(narrowed(run, "mistral-7b")) == MODELS["7B"]
    assert ModelShape.of(narrowed(run, "llama-3-8b-instruct")).parameters / 1e9 == pytest.approx(8.03, rel=1e-3)


def test_all_parts_together_leave_time_for_their_start_within_nine_minutes():
    assert LIMITS.keys() == PARTS.keys()
    assert sum(LIMITS.values()) <= 9 * 60 - 20


@pytest.mark.parametrize("part", ["mistral-7b", "llama-3-8b"])
def test_every_step_of_a_model_is_measured_beside_its_prediction(part, run, tmp_path):
    PARTS[part](run(part))
    found = rows(tmp_path)
    assert [(row["name"], row["error"]) for row in found if "error" in row] == []
    steps = [row for row in found if "predicted_seconds" in row]
    settings = {(row["name"], row["setting"]) for row in steps}
    expected = {("ELM", "sdpa"), ("SFT", "sdpa")}
    if part == "mistral-7b":
        expected |= {(name, "sdpa, checkpointing") for name in ("ELM", "SFT")} | {("NPO", ""), ("RMU", "layer 2")}
        expected |= {("SFT", "sdpa, padding-free"), ("SFT", "sdpa, packed")}
    assert settings == expected
    for row in steps:
        assert len(row["spread"]) == 2 and min(row["seconds"], row["predicted_seconds"], row["peak_bytes"]) > 0
        assert ("bytes_ratio" in row) == (row["name"] != "SFT")
    # All fine-tune on the same tokens, whose mean loss is that of a random model wherever the adapter has been taken off.
    losses = [row["loss"] for row in steps if row["name"] == "SFT"]
    assert max(losses) - min(losses) < 0.02  # in bfloat16, laid into rows in several ways
    found = summary({part: {"rows": found}})[part]
    assert found["step_vs_sft"] > 0 and found["memory_vs_prediction"] > 0


def test_a_base_of_four_bits_is_made_without_a_file(run, tmp_path):
    PARTS["qlora"](run("qlora"))
    [_, row] = rows(tmp_path)
    assert (row["name"], row["setting"]) == ("ELM", "4-bit base") and row["seconds"] > 0


def test_without_bitsandbytes_the_part_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_parts.is_bitsandbytes_available", lambda: False)
    PARTS["qlora"](run("qlora"))
    [row] = rows(tmp_path)
    assert "pip install" in row["skipped"]
    assert went_well({"status": "done", "rows": [row]})


def test_the_demo_runs_in_bf16(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    PARTS["demo"](run("demo"))
    [row] = rows(tmp_path)
    assert "error" not in row and row["figures"]["families.erased.pmi"].keys() == {"reference", "erased"}
    config = json.loads((tmp_path / "demo" / "report.json").read_text())["recipe"]
    assert config["bf16"] is True and config["use_cpu"] is True


def test_the_tests_are_counted_and_those_that_fail_named(run, tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_it.py").write_text(
        "import pytest\n\ndef test_good(): pass\n\ndef test_bad(): assert 0\n\n@pytest.mark.gpu\ndef test_card(): assert 0\n"
    )
    marked_tests(run("tests"), str(folder))
    [row] = rows(tmp_path)
    assert row["passed"] == 1 and "['test_bad']" in row["error"] and "assert 0" in row["output"]
    assert not went_well({"status": "done", "rows": [row]})


def test_what_fails_is_a_row_and_the_rest_goes_on(run, tmp_path):
    part = run("mistral-7b")
    with part.attempt("ELM", "sdpa"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    part.add("ELM", "sdpa, checkpointing", seconds=1.0)
    found = rows(tmp_path)
    assert found[0]["error"] == "OutOfMemoryError: CUDA out of memory." and "raise torch" in found[0]["traceback"]
    # What did not fit is no failure beside a setting that did; nor is any other error forgiven for it.
    assert went_well({"status": "done", "rows": found})
    assert not went_well({"status": "done", "rows": found[:1]})
    assert not went_well(
        {"status": "done", "rows": [*found, {"name": "ELM", "setting": "", "error": "ValueError: x"}]}
    )
    assert fastest(found, "ELM") == found[1] and fastest(found, "SFT") is None


SCRIPT = """
import json, os, subprocess, sys, time
folder = sys.argv[sys.argv.index("--folder") + 1]
with open(folder + "/rows.jsonl", "a") as file:
    file.write(json.dumps({"name": "ELM", "setting": "", "seconds": 1.0, "cuda": os.environ["CUDA_VISIBLE_DEVICES"]}) + "\\n")
    file.write('{"name": "half')
print("said")
"""


@pytest.mark.parametrize(
    ("more", "status"), [("", "done"), ("sys.exit(3)", "failed"), ("subprocess.run(['sleep', '60'])", "stopped")]
)
def test_a_part_keeps_its_rows_however_it_ends(more, status):
    part = run_part("any", "cpu", "tiny", 3.0, [sys.executable, "-c", SCRIPT + more])
    assert part["status"] == status
    assert part["rows"] == [{"name": "ELM", "setting": "", "seconds": 1.0, "cuda": ""}]
    assert part["seconds"] < 10
    assert ("output" in part) == (status != "done") and went_well(part) == (status == "done")


@pytest.fixture
def report(monkeypatch, tmp_path):
    """A report of two parts, one of which fails, as the command writes it."""
    step = {"name": "ELM", "setting": "sdpa", "seconds": 2.0, "predicted_seconds": 1.0, "peak_bytes": 5e10}
    found = {
        "mistral-7b": {
            "status": "done",
            "rows": [step | {"predicted_bytes": 4e10}, step | {"name": "SFT", "seconds": 4.0}],
        },
        "qlora": {"status": "stopped", "rows": []},
    }
    monkeypatch.setattr("benchmarks.gpu.run_part", lambda name, *_: found[name] | {"seconds": 70.0, "limit": 70.0})
    with pytest.raises(SystemExit, match="gpu.json"):
        main(BenchmarkArguments(["gpu"], str(tmp_path), device="cpu", size="tiny", parts=list(found)))
    return tmp_path / "gpu.json"


def test_the_report_says_what_was_measured_on_what(report):
    found = json.loads(report.read_text())
    assert found["card"] == {"name": "cpu"} and found["machine"]["libraries"]["torch"] == version("torch")
    assert found["complete"] is False
    assert found["summary"] == {"mistral-7b": {"memory_vs_prediction": 1.25, "step_vs_sft": 0.5}}
    assert [path.name for path in report.parent.iterdir()] == ["gpu.json"]


def test_the_page_shows_a_report_that_is_committed(report, tmp_path):
    table = page_table(report)
    assert "| mistral-7b | ELM, sdpa | 1.000 / 2.000 s | 40.0 / 50.0 GB |" in table
    assert "| mistral-7b | SFT, sdpa | 1.000 / 4.000 s | – / 50.0 GB |" in table
    assert "| qlora | stopped after 70 s | – | – |" in table
    assert "ELM / the fastest fine-tuning 0.50" in table
    assert "None was run" in page_table(tmp_path / "absent.json")


def test_without_a_card_the_command_says_how_to_run_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`device` is 'cuda'.*--device cpu --size tiny"):
        measure_gpu(tmp_path, "cuda", "full", ["demo"])


def test_a_card_is_found_by_the_beginning_of_its_name():
    assert sheet_of("NVIDIA H100 80GB HBM3") == (989e12, 3.35e12)
    assert sheet_of("NVIDIA H100 PCIe") == (756e12, 2.0e12)
    assert sheet_of("NVIDIA GeForce RTX 4090") is None


def test_a_cut_vocabulary_spells_the_same_texts_in_more_tokens(tokenizer):
    cut, text = cut_vocabulary(tokenizer, 1000), "The capital of Norway is Oslo.\n"
    ids = cut(text)["input_ids"]
    assert len(cut) == 1000 and max(ids) < 1000
    assert cut.decode(ids) == text and len(ids) > len(tokenizer(text)["input_ids"])
    assert cut.eos_token_id == tokenizer.eos_token_id
    assert cut_vocabulary(tokenizer, len(tokenizer)) is tokenizer


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="`parts` names \\['tpu'\\].*demo"):
        BenchmarkArguments(parts=["tpu"])
