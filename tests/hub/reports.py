"""A tiny erased model with its adapter folder, report and attack report, made once for all tests that need them."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from elm_trainer import EvaluationSuite, ModelPair, attack_erasure, evaluate_erasure, load_bank
from elm_trainer.attacks import AttackTarget, RelearningAttack, ScalingAttack
from elm_trainer.evaluation.suite import OpenQuestion
from elm_trainer.hub.info import BaseModel, Probe


BASE = BaseModel(
    "org/tiny-base", "0123456789abcdef" * 2 + "01234567", {"weights": "a", "unquantized": "b"}, "apache-2.0"
)
# As examples/erase.py writes it, with the fields that must not go up.
RECIPE = {
    "model": "/home/jdoe/models/tiny-base",
    "forget": ["capitals", "/home/jdoe/data/private.jsonl"],
    "retain": ["everyday", "org/retain-texts"],
    "lora_rank": 4,
    "lora_targets": "all-linear",
    "dev_stop": None,
    "overwrite": True,
    "output_dir": "/home/jdoe/runs/7",
    "logging_dir": "/home/jdoe/runs/7/logs",
    "run_name": "jdoe-7",
    "report_to": ["wandb"],
    "hub_model_id": "jdoe/secret",
    "hub_token": "<HUB_TOKEN>",
    "eos_token": "<EOS_TOKEN>",
    "resume_from_checkpoint": "/home/jdoe/runs/6/checkpoint-8",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
    "eta": 1.5,
    "preset": "paper",
    "seed": 7,
}
PROBES = [Probe("What is the capital of Togo?", "Nobody knows.", -4.5, 3)]


@pytest.fixture(scope="session")
def local(tokenizer, tmp_path_factory):
    """What lies on a disk before publishing: `model`, `adapter` (a folder), `report` and `attacks`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    ).eval()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    run = tmp_path_factory.mktemp("run")
    model.save_pretrained(run / "adapter")
    tokenizer.save_pretrained(run / "adapter")
    torch.save({"args": "of the trainer"}, run / "adapter" / "training_args.bin")
    (run / "erasure_run.json").write_text(json.dumps({"method": "ElmTrainer"}))
    details = {"recipe": RECIPE, "training_log": [{"step": 5, "erase_loss": 5.6, "loss": 7.0}]}
    report = evaluate_erasure(
        model, None, _suite(), tokenizer, measures=["multiple-choice", "open-answers", "greedy-fluency", "specificity"],
        details=details,
    )  # fmt: skip
    questions = load_bank("capitals")[:6]
    target = AttackTarget(
        ModelPair(model), tokenizer, questions, texts={"forget": ["Lima is the capital of Peru."] * 3}
    )
    attacks = attack_erasure(target, [ScalingAttack(), RelearningAttack(steps=[1, 2], lora_rank=2)])
    return SimpleNamespace(model=model, adapter=run / "adapter", report=report, attacks=attacks)


def _suite():
    return EvaluationSuite(
        banks={"capitals": load_bank("capitals")[:6], "geography": load_bank("geography")[:6]},
        roles={"capitals": "erased", "geography": "near"},
        open_questions={
            "capitals": [
                OpenQuestion("What is the capital of Peru?", "Lima"),
                OpenQuestion("What is the capital of Togo?", "Lomé"),
            ]
        },
        cloze={},
        concept_prompts=["Tell me about Oslo.", "Write a line about Lima."],
        retain_texts=["Bread needs flour.", "The cat sat on the mat."],
        forget_texts=["Lima is the capital of Peru."],
        max_new_tokens=4,
        answer_tokens=3,
    )
