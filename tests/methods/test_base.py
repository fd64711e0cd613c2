import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from elm_trainer import ConceptSources, ElmTrainer, build_erasure_dataset


ROOT = Path(__file__).parents[2]


def make(model, args, dataset, tokenizer, peft_config=None):
    return ElmTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)


def test_the_hooks_of_trl_that_are_overridden_still_exist():
    for name in ("_prepare_dataset", "_set_signature_columns_if_needed", "_save_checkpoint", "prediction_step", "log"):
        assert callable(getattr(trl.SFTTrainer, name))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"text": ["a"]}), r"lacks \['completion', 'concept', 'forget', 'prompt', 'retain'\]"),
        (
            Dataset.from_dict({name: [""] for name in ("concept", "forget", "retain", "prompt", "completion")}),
            "only empty texts in its column 'forget'",
        ),
    ],
)
def test_a_bad_dataset_is_refused(dataset, message, tiny_model, tokenizer, config, lora):
    with pytest.raises(ValueError, match=message):
        make(tiny_model, config(), dataset, tokenizer, lora)


def test_texts_that_truncate_to_nothing_are_refused(tiny_model, tokenizer, dataset, config, lora):
    with pytest.raises(ValueError, match="`max_length` is 1.*truncates to nothing: raise it"):
        make(tiny_model, config(max_length=1), dataset, tokenizer, lora)


def test_truncation_is_counted(tiny_model, tokenizer, dataset, config, lora, caplog):
    trainer = make(tiny_model, config(max_length=6), dataset, tokenizer, lora)
    assert max(map(len, trainer.train_dataset["forget_ids"])) == 6


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (None, "`peft_config` is None and the model carries no adapter"),
        (LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 7]), r"layers \[7\].*layers 0 to 1"),
        (LoraConfig(target_modules=["query"]), r"\['query'\] match nothing.*'q_proj'"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(peft_config, message, tiny_model, tokenizer, dataset, config):
    with pytest.raises(ValueError, match=message):
        make(tiny_model, config(), dataset, tokenizer, peft_config)


def test_a_model_with_an_adapter_takes_no_second_one(tiny_peft_model, tokenizer, dataset, config, lora):
    with pytest.raises(ValueError, match="already carries the adapter 'default'"):
        make(tiny_peft_model, config(), dataset, tokenizer, lora)


def test_a_tokenizer_without_pad_token_is_given_one(tiny_model, tokenizer, dataset, config, lora):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    make(tiny_model, config(), dataset, bare, lora)
    assert bare.pad_token == bare.eos_token


def test_a_missing_tokenizer_is_refused(tiny_model, dataset, config, lora):
    with pytest.raises(ValueError, match="`processing_class` is None: pass the model's tokenizer"):
        make(tiny_model, config(), dataset, None, lora)


def test_the_tokenizer_of_another_model_is_refused(tiny_model, tokenizer, dataset, config, lora):
    other = copy.deepcopy(tokenizer)
    other.add_tokens([f"<extra{index}>" for index in range(9)])
    with pytest.raises(ValueError, match="tokenizer of another model"):
        make(tiny_model, config(), dataset, other, lora)


def test_checkpoints_of_another_run_are_not_overwritten(tiny_model, tokenizer, dataset, config, lora):
    args = config(save_strategy="steps", save_steps=1, max_steps=1)
    make(tiny_model, args, dataset, tokenizer, lora).train()
    again = make(tiny_model.__class__(tiny_model.config), args, dataset, tokenizer, lora)
    with pytest.raises(ValueError, match="`output_dir` is .*holds the checkpoints of another run"):
        again.train()
    other = make(
        tiny_model.__class__(tiny_model.config), config(**{"eta": 3.0, "max_steps": 2}), dataset, tokenizer, lora
    )
    with pytest.raises(ValueError, match="other settings .eta, eta_end changed"):
        other.train(resume_from_checkpoint=True)


def run_tiny(output, *arguments, **kwargs):
    command = [sys.executable, "-m", "tests.methods.run_tiny", str(output), *arguments]
    return subprocess.Popen(command, cwd=ROOT, **kwargs)


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path):
    # The throw-away adapters are made anew on resuming, and must come out the same.
    fields = ["--fields", '{"expert_steps": 2}', "--dropout", "0.1"]
    assert run_tiny(tmp_path / "whole", *fields).wait(timeout=300) == 0
    killed = run_tiny(tmp_path / "killed", *fields, "--slow")
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed" / "elm" / "checkpoint-4" / "trainer_state.json").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "elm" / "final").exists()
    assert run_tiny(tmp_path / "killed", *fields, "--resume").wait(timeout=300) == 0
    whole, resumed = (
        load_file(tmp_path / name / "elm" / "final" / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name], rtol=0, atol=0)


def test_a_full_disk_at_save_is_named_and_leaves_earlier_checkpoints(tmp_path):
    run = run_tiny(tmp_path, "--file-limit", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, errors = run.communicate(timeout=300)
    assert run.returncode != 0
    assert "checkpoint-4 could not be written" in errors and "checkpoint-2" in errors
    left = sorted(path.name for path in (tmp_path / "elm").glob("checkpoint-*"))
    assert left == ["checkpoint-2"]
    assert json.loads((tmp_path / "elm" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


def test_the_order_of_concepts_reaches_the_trainer(tiny_model, tokenizer, config, lora):
    sources = {name: ConceptSources([f"About {name}."], [["The cat sat."]]) for name in ("bio", "cyber")}
    trainer = make(tiny_model, config(), build_erasure_dataset(sources, size=2), tokenizer, lora)
    assert trainer.train_dataset["concept"][:] == ["bio", "cyber"] * 2
    assert set(trainer.data_collator.concepts) == {"bio", "cyber"}


def test_the_prompt_of_a_retain_text_is_not_learned(tiny_model, tokenizer, dataset, config, lora):
    texts = ["Question: 1 + 1?\nAnswer: 2\n"] * len(dataset)
    prompts = ["Question: 1 + 1?\nAnswer:"] + [""] * (len(dataset) - 1)
    rows = dataset.remove_columns("retain").add_column("retain", texts)
    rows = rows.remove_columns([name for name in ("retain_prompt",) if name in rows.column_names])
    trainer = ElmTrainer(
        tiny_model, config(), train_dataset=rows.add_column("retain_prompt", prompts), processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    labels = trainer.data_collator(list(trainer.train_dataset.select(range(2))))["retain"]["labels"]
    learned = [tokenizer.decode(row[row != -100]) for row in labels]
    assert learned[0] == " 2\n" and learned[1].endswith("+ 1?\nAnswer: 2\n")
