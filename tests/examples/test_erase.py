import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_real_model_forgets_capitals_and_keeps_the_rest(tmp_path):
    command = [sys.executable, "examples/erase.py", "--config", "recipes/smollm2-135m-capitals.yaml"]
    shorter = {"output_dir": tmp_path / "out", "dataset_size": 144, "max_steps": 12, "questions": 60}

    subprocess.run([*command, *(f"--{key}={value}" for key, value in shorter.items())], cwd=ROOT, check=True)

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = (
        {name: sides[side]["value"] for name, sides in report["figures"].items()} for side in ("reference", "erased")
    )
    name = "multiple_choice.capitals.pmi"
    assert before[name] > 0.6 and after[name] < before[name] - 0.15
    assert after["open_answers.names_answer"] <= 0.05 < before["open_answers.names_answer"]
    assert after["fluency.empty"] == 0
    assert after["fluency.r_ppl"] < 2 * before["fluency.r_ppl"]
    assert after["retention.perplexity"] < 1.05 * before["retention.perplexity"]
    assert after["multiple_choice.elements.pmi"] > before["multiple_choice.elements.pmi"] - 0.1
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter", "report.png", "samples.md"}
