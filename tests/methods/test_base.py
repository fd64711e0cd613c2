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
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from elm_trainer import ConceptSources, ElmTrainer, NonFiniteLossError, build_erasure_dataset


RUN = Path(__file__).parent / "run_tiny.py"


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


def test_a_frozen_adapter_is_refused(tiny_model, tiny_peft_model, tokenizer, dataset, config, tmp_path):
    tiny_peft_model.save_pretrained(tmp_path / "adapter")
    base = tiny_peft_model.unload()
    frozen = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match="'default' of the model is frozen.*is_trainable=True"):
        make(frozen, config(), dataset, tokenizer)


def test_a_tokenizer_without_pad_token_is_given_one(tiny_model, tokenizer, dataset, config, lora):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    make(tiny_model, config(), dataset, bare, lora)
    assert bare.pad_token == bare.eos_token


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


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tiny_model, tokenizer, dataset, config, lora
):
    trainer = make(
        tiny_model, config(save_strategy="steps", save_steps=1, max_steps=5, logging_steps=1), dataset, tokenizer, lora
    )

    def poison(module, args):
        if trainer.state.global_step >= 2 and torch.is_grad_enabled():
            return (args[0] * float("nan"), *args[1:])

    tiny_model.get_output_embeddings().register_forward_pre_hook(poison)
    with pytest.raises(NonFiniteLossError, match="`(erase|retain|consistency)_loss` became nan.*checkpoint-2"):
        trainer.train()
    folders = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert folders == ["checkpoint-1", "checkpoint-2"]


def run_tiny(output, *arguments, **kwargs):
    return subprocess.Popen([sys.executable, str(RUN), str(output), *arguments], **kwargs)


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path):
    assert run_tiny(tmp_path / "whole").wait(timeout=300) == 0
    killed = run_tiny(tmp_path / "killed", "--slow")
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "final").exists()
    assert run_tiny(tmp_path / "killed", "--resume").wait(timeout=300) == 0
    whole, resumed = (
        load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name], rtol=0, atol=0)


def test_a_full_disk_at_save_is_named_and_leaves_earlier_checkpoints(tmp_path):
    result = subprocess.run(
        [sys.executable, str(RUN), str(tmp_path / "run"), "--file-limit"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode != 0
    assert "checkpoint-4 could not be written" in result.stderr and "checkpoint-2" in result.stderr
    left = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert left == ["checkpoint-2"]
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.distributed
def test_one_and_two_processes_report_the_same_loss(tmp_path):
    losses = []
    for processes, batch in ((1, 4), (2, 2)):
        output = tmp_path / str(processes)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "29517"] if processes > 1 else []
        result = subprocess.run(
            [*command, str(RUN), str(output), "--batch", str(batch)], capture_output=True, text=True, timeout=400
        )
        assert result.returncode == 0, result.stderr[-2000:]
        state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_order_of_concepts_reaches_the_trainer(tiny_model, tokenizer, config, lora):
    sources = {name: ConceptSources([f"About {name}."], [["The cat sat."]]) for name in ("bio", "cyber")}
    trainer = make(tiny_model, config(), build_erasure_dataset(sources, size=2), tokenizer, lora)
    assert trainer.train_dataset["concept"][:] == ["bio", "cyber"] * 2
    assert set(trainer.data_collator.concepts) == {"bio", "cyber"}
