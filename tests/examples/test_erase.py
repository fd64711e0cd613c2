import json
import sys

import pytest
import torch

from elm_trainer.distributed import multiplies_in_bfloat16
from tests.processes import run


@pytest.mark.slow
def test_a_real_model_forgets_capitals_and_keeps_the_rest(tmp_path):
    command = [sys.executable, "examples/erase.py", "--config", "recipes/smollm2-135m-capitals.yaml"]
    shorter = {"output_dir": tmp_path / "out", "targets_dir": tmp_path / "targets"}
    shorter |= {"dataset_size": 200, "max_steps": 100, "questions": 16, "bf16_full_eval": False}
    measured = ["--measures", "multiple-choice", "open-answers", "greedy-fluency", "specificity"]
    options = [f"--{key}={value}" for key, value in shorter.items()]
    run([*command, *options, *measured], check=True, timeout=900)

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = (
        {name: sides[side]["value"] for name, sides in report["figures"].items()} for side in ("reference", "erased")
    )
    name = "multiple_choice.capitals.pmi"
    assert before[name] > 0.6 and after[name] < before[name] - 0.15
    assert (
        before["open_answers.capitals"] > 0.4 and after["open_answers.capitals"] <= before["open_answers.capitals"] / 2
    )
    assert after["fluency.greedy.empty"] == 0
    assert after["fluency.greedy.r_ppl"] < 2 * before["fluency.greedy.r_ppl"]
    assert after["retention.perplexity"] < 1.05 * before["retention.perplexity"]
    assert after["multiple_choice.elements.pmi"] > before["multiple_choice.elements.pmi"] - 0.1
    assert report["verdict"]["seamlessness"]["checks"] and report["roles"]["geography"] == "near"
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"adapter", "report.json", "report.md", "report.png", "samples.md"}

    [described] = (tmp_path / "targets").glob("*/targets.json")
    made = json.loads(described.read_text())["key"]
    in_bfloat16 = multiplies_in_bfloat16(torch.device("cpu"))
    assert (made["autocast"], made["attention"]) == ("bf16" if in_bfloat16 else "no", "eager")

    # The saved adapter, measured again by itself, gives the same figures.
    again = [sys.executable, "examples/evaluate.py", f"--adapter={tmp_path / 'out' / 'adapter'}", "--questions=16"]
    again += [f"--output_dir={tmp_path / 'again'}", "--measures", "open-answers", "specificity"]
    run(again, check=True)
    for name, figure in json.loads((tmp_path / "again" / "report.json").read_text())["figures"].items():
        assert figure["erased"]["value"] == pytest.approx(report["figures"][name]["erased"]["value"], rel=1e-4), name
