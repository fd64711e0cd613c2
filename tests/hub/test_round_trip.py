"""The real model: publish an adapter with the example, and load it in another process with a fresh cache."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from elm_trainer import EvaluationSuite, evaluate_erasure, load_bank, load_model_and_tokenizer
from elm_trainer.evaluation.suite import OpenQuestion
from elm_trainer.modeling import DEMO_MODEL, demo_model_file


QUESTION = "What is the capital of France?"
LOAD = f"""
import sys, torch
from elm_trainer import load_erased, read_report
from huggingface_hub import hf_hub_download
model, tokenizer = load_erased("alice/erased", verify=True)
with torch.no_grad():
    logits = model(**tokenizer({QUESTION!r}, return_tensors="pt")).logits
torch.save({{"logits": logits, "report": read_report(hf_hub_download("alice/erased", "report.json"))}}, sys.argv[1])
"""


@pytest.mark.slow
def test_logits_and_report_come_back_bit_for_bit(hub, hub_api, tmp_path):
    gguf = demo_model_file()
    hub_api.create_repo("alice/base")
    hub_api.upload_file(path_or_fileobj=gguf, path_in_repo=gguf.name, repo_id="alice/base")
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

    publish = [sys.executable, "examples/publish.py", "--adapter", str(tmp_path / "run" / "adapter")]
    publish += [
        "--repo_id",
        "erased",
        "--base_model",
        "alice/base",
        "--gguf_file",
        gguf.name,
        "--license",
        "apache-2.0",
    ]
    publish += ["--staging_dir", str(tmp_path / "staged")]
    subprocess.run(publish, env=hub.env("hf_alice", tmp_path / "home"), check=True)
    loaded = tmp_path / "loaded.pt"
    subprocess.run([sys.executable, "-c", LOAD, str(loaded)], env=hub.env("hf_alice", tmp_path / "fresh"), check=True)

    found = torch.load(loaded)
    assert torch.equal(found["logits"], logits)
    assert found["report"] == json.loads((tmp_path / "staged" / "report.json").read_text())
    assert found["report"]["figures"] == json.loads(json.dumps(report["figures"]))
