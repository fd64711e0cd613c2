import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import yaml

from elm_trainer.comparison.run import MethodRun
from elm_trainer.files import Runs
from tests.evaluation.comparison.conftest import checkpoint, one_setting, reference_of, tiny


ROOT = Path(__file__).parents[2]
__all__ = ["checkpoint", "one_setting", "reference_of", "tiny"]
pytestmark = pytest.mark.slow


@pytest.fixture
def config(one_setting, tmp_path):
    ladder = tmp_path / "ladder.yaml"
    ladder.write_text("- {attack: scaling, factors: [0.5]}\n")
    return one_setting(seeds=[0], ladder=str(ladder), attack_questions=4)


def test_a_stopped_comparison_goes_on_and_writes_report_table_and_picture(config, reference_of, tmp_path):
    # What a run that was stopped after the first method has left.
    runs = Path(config.output_dir) / "runs"
    MethodRun(config, "elm", Runs(runs), reference_of(config), None).run()
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(asdict(config)))

    subprocess.run([sys.executable, "examples/compare.py", "--config", str(recipe)], cwd=ROOT, check=True)

    assert finished and {path: path.stat().st_mtime_ns for path in finished} == finished
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kind"] == "comparison" and list(report["methods"]) == ["elm", "graddiff"] == list(report["attacks"])
    tables = report["tables"]
    assert tables["updates"]["budget"] == 2 and tables["updates"]["methods"]["graddiff"]["updates"] == [2]
    assert tables["seconds"]["budget"] == tables["updates"]["methods"]["elm"]["seconds"][0]
    timed = tables["seconds"]["methods"]["graddiff"]
    # On models this small the set-up alone can take as long as all of ELM's training: then no update is made.
    assert timed["seconds"][0] <= tables["seconds"]["budget"] or timed["updates"] == [0]
    assert all(entry["peak_memory_bytes"] and entry["seconds_per_sample"] > 0 for entry in report["methods"].values())
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("| ELM |") >= 4 and text.count("| GradDiff |") >= 4
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 10_000


def test_a_killed_comparison_leaves_no_process_that_trains_on(config, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(asdict(config)))
    command = [sys.executable, "examples/compare.py", "--config", str(recipe)]
    with subprocess.Popen(command, cwd=ROOT) as comparison:
        process, workers = psutil.Process(comparison.pid), []
        while not workers:
            assert comparison.poll() is None
            time.sleep(0.05)
            workers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
        comparison.kill()

    _, alive = psutil.wait_procs(workers, timeout=60)

    assert not alive and not list(Path(config.output_dir).glob("runs/*"))
