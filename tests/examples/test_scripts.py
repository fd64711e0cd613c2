"""What every script in `examples/` does alike."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SHARED = re.compile(r"^from elm_trainer\.cli\b", re.MULTILINE)
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if SHARED.search(path.read_text()))
BAR = re.compile(r"(?P<name>.*?):? *\d+%\|.*")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_does_not_wait_for_torch(script):
    code = f"import runpy, sys; sys.argv = [{str(script)!r}, '--help']\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "except SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert printed.stdout.startswith("usage: ") and "--help" in printed.stdout


@pytest.fixture
def tiny_folder(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.slow
def test_a_run_prints_nothing_that_nobody_can_act_on(tiny_folder, tmp_path):
    recipe = ROOT / "recipes" / "smollm2-135m-capitals.yaml"
    smaller = {
        "model": tiny_folder, "output_dir": tmp_path / "out", "targets_dir": tmp_path / "targets", "dataset_size": 16,
        "max_steps": 4, "lora_layers": "0-1", "state_layers": 1, "questions": 8, "dev_every": 2, "warmup_steps": 0,
    }  # fmt: skip
    command = [sys.executable, "examples/erase.py", "--config", str(recipe)]
    command += [f"--{name}={value}" for name, value in smaller.items()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in re.split(r"[\r\n]+|\x1b\[A", run.stderr) if line.strip()]
    bars = [BAR.fullmatch(line) for line in lines]
    assert [line for line, bar in zip(lines, bars, strict=True) if bar is None] == []
    names = {bar["name"].strip() for bar in bars}
    assert names >= {"Computing targets", "Training", "reference: multiple choice"} and "" not in names
    assert "WARNING" not in run.stdout and "Warning" not in run.stdout
    logged = json.loads((tmp_path / "out" / "report.json").read_text())["training_log"]
    assert sum("dev_multiple_choice.capitals.pmi" in entry for entry in logged) == 2


@pytest.mark.distributed
@pytest.mark.parametrize("command", ["erase", "evaluate"])
def test_a_launched_process_leaves_its_group_before_it_ends(command, tiny_folder, tmp_path):
    # One that ends within its group may be aborted by the threads of gloo (SIGABRT, "terminate called without an active exception").
    options = [
        f"--model={tiny_folder}",
        f"--output_dir={tmp_path / 'out'}",
        "--questions=4",
        "--measures=multiple-choice",
    ]
    if command == "evaluate":
        options += [f"--reference={tiny_folder}"]
    else:
        options += [
            "--evaluate=false",
            "--dataset_size=4",
            "--max_steps=1",
            "--per_device_train_batch_size=2",
            "--bf16=false",
        ]
        options += [
            "--concepts=capitals",
            "--forget=capitals",
            "--retain=everyday",
            "--use_cpu=true",
            "--report_to=none",
        ]
        options += [f"--targets_dir={tmp_path / 'targets'}"]
    code = "import sys, torch.distributed as group\nfrom elm_trainer.cli.main import main\njoined, join = [], group.init_process_group\n"
    code += "group.init_process_group = lambda *args, **options: (joined.append(1), join(*args, **options))\n"
    code += "main(sys.argv[1:])\nprint('joined', len(joined), 'left', not group.is_initialized())"
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    launched = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    run = subprocess.run(
        [sys.executable, "-c", code, command, *options],
        cwd=ROOT,
        env=os.environ | launched | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.endswith("joined 1 left True\n")


def test_evaluate_asks_the_questions_of_the_split_it_is_told(tiny_folder, tmp_path):
    from elm_trainer.cli.main import main
    from elm_trainer.evaluation.report import read_report

    asked = {}
    for split in ("dev", "test"):
        options = [f"--model={tiny_folder}", f"--reference={tiny_folder}", f"--output_dir={tmp_path / split}"]
        main(["evaluate", *options, f"--split={split}", "--questions=12", "--measures=multiple-choice"])
        report = read_report(tmp_path / split / "report.json")
        assert report["recipe"]["split"] == split
        asked[split] = report["datasets"]["bank capitals"]
        assert asked[split]["revision"].endswith(f" {split}")
    assert asked["dev"]["sha256"] != asked["test"]["sha256"]


def test_the_leaderboard_offers_every_column_that_can_be_ranked_by():
    from elm_trainer.cli import adapters
    from elm_trainer.hub.leaderboard import SORTS

    assert adapters.SORTS == SORTS
