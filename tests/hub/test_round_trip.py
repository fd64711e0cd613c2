"""The real model: publish an adapter as the Hub on loopback says, and load it in another process with a fresh cache."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from elm_trainer import EvaluationSuite, evaluate_erasure, load_bank, load_model_and_tokenizer
from elm_trainer.evaluation.suite import OpenQuestion
from elm_trainer.modeling import DEMO_MODEL


ROOT = Path(__file__).parents[2]
LAST_LINE = "Repositories are kept in memory and are gone when this ends (Ctrl-C).\n"
QUESTION = "What is the capital of France?"
LOAD = f"""
import sys, torch
from elm_trainer import load_erased, read_report
from huggingface_hub import hf_hub_download
model, tokenizer = load_erased("alice/erased-capitals", verify=True)
with torch.no_grad():
    logits = model(**tokenizer({QUESTION!r}, return_tensors="pt")).logits
torch.save({{"logits": logits, "report": read_report(hf_hub_download("alice/erased-capitals", "report.json"))}}, sys.argv[1])
"""


@pytest.mark.slow
def test_logits_and_report_come_back_bit_for_bit(tmp_path):
    base, tokenizer = load_model_and_tokenizer(DEMO_MODEL)
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(r=8, layers_to_transform=[10, 11], target_modules=["q_proj", "v_proj"])
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
        logits = model(**tokenizer(QUESTION, return_tensors="pt")).logits
    model.save_pretrained(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "erasure_run.json").write_text('{"method": "ElmTrainer"}')
    suite = EvaluationSuite(
        banks={"capitals": load_bank("capitals")[:4]},
        roles={"capitals": "erased"},
        # What the model does not know: an answer that tells the truth is not stored to be asked again.
        open_questions={"capitals": [OpenQuestion("What is the capital of Palau?", "Ngerulmud")]},
        cloze={},
        concept_prompts=[],
        retain_texts=[],
    )
    report = evaluate_erasure(
        model, None, suite, tokenizer, measures=["multiple-choice", "open-answers"], output_dir=tmp_path / "run",
        details={"recipe": {"model": DEMO_MODEL, "forget": ["capitals"], "seed": 0}},
    )  # fmt: skip

    loaded = tmp_path / "loaded.pt"
    server = [sys.executable, "-m", "tests.hub_server", "--root", str(tmp_path / "hub")]
    with subprocess.Popen(server, cwd=ROOT, stderr=subprocess.PIPE, text=True) as hub:
        try:
            told = list(iter(hub.stderr.readline, LAST_LINE))
            [settings] = [line.split()[1:] for line in told if line.startswith("  export ")]
            environment = os.environ | dict(setting.split("=", 1) for setting in settings)
            commands = [shlex.split(line)[1:] for line in told if line.startswith("  python ")]
            assert [command[0] for command in commands] == ["examples/publish.py"] * 2 + ["examples/leaderboard.py"]
            for command in commands:
                command = [
                    str(tmp_path / "run" / "adapter") if word == "outputs/demo/adapter" else word for word in command
                ]
                place = ["--staging_dir", str(tmp_path / "staged")] if "--adapter" in command else []
                home = {"HF_HOME": str(tmp_path / "home")}
                subprocess.run([sys.executable, *command, *place], cwd=ROOT, env=environment | home, check=True)
            fresh = environment | {"HF_HOME": str(tmp_path / "fresh")}
            subprocess.run([sys.executable, "-c", LOAD, str(loaded)], cwd=ROOT, env=fresh, check=True)
        finally:
            hub.terminate()

    found = torch.load(loaded)
    assert torch.equal(found["logits"], logits)
    assert found["report"] == json.loads((tmp_path / "staged" / "report.json").read_text())
    assert found["report"]["figures"] == json.loads(json.dumps(report["figures"]))
