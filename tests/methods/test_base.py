import copy
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from elm_trainer import ConceptSources, ElmDataCollator, ElmTrainer, build_erasure_dataset
from elm_trainer.concept import load_concept
from elm_trainer.files import RUN_FILE
from elm_trainer.methods.config import KEPT

from ..processes import Forked
from .methods import METHODS, tiny


def make(model, args, dataset, tokenizer, peft_config=None):
    return ElmTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)


def test_the_hooks_of_trl_that_are_overridden_still_exist():
    for name in ("_prepare_dataset", "_set_signature_columns_if_needed", "_save_checkpoint", "prediction_step", "log"):
        assert callable(getattr(trl.SFTTrainer, name))


def test_an_adapter_is_saved_without_the_card_of_a_library(tiny_model, tokenizer, dataset, config, lora, tmp_path):
    trainer = make(tiny_model, config(), dataset, tokenizer, lora)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "adapter" / "README.md").exists()
    (tmp_path / "adapter" / "README.md").write_text("Mine.")
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "README.md").read_text() == "Mine."


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


def test_the_split_of_a_dataset_dict_is_asked_for(tiny_model, tokenizer, dataset, config, lora):
    with pytest.raises(TypeError, match=r"`train_dataset` is a DatasetDict with \['all'\]: give one .*\['all'\]"):
        make(tiny_model, config(), DatasetDict({"all": dataset}), tokenizer, lora)


def test_texts_that_truncate_to_nothing_are_refused(tokenizer, dataset, config, lora):
    with pytest.raises(ValueError, match="`max_length` is 1: it must be at least 2"):
        config(max_length=1)
    contexts = load_concept("capitals")
    longest = max(len(tokenizer(text)["input_ids"]) for text in contexts.expert_contexts + contexts.novice_contexts)
    model = tiny("llama", len(tokenizer))
    model.config.max_position_embeddings = longest
    with pytest.raises(ValueError, match="`max_length` is .* truncates to nothing: raise it, or use shorter contexts"):
        make(model, config(), dataset, tokenizer, lora)


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


def run_tiny(output, *arguments):
    return Forked([sys.executable, "-m", "tests.methods.run_tiny", str(output), *arguments])


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
    run = run_tiny(tmp_path, "--file-limit")
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


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A model in a folder, without and with its tokenizer."""
    for name in ("bare", "whole"):
        tiny("llama", len(tokenizer)).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "whole")
    tiny("llama", 300).save_pretrained(tmp_path / "small")
    return tmp_path


@pytest.mark.parametrize("as_object", [True, False])
@pytest.mark.parametrize(
    ("name", "lora", "fields", "message"),
    [
        ("bare", {"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, {}, r"names the layers \[7\]"),
        ("bare", {"target_modules": ["q_proj", "vproj"]}, {}, r"\['vproj'\] match nothing"),
        ("bare", {"target_modules": ["q_proj"], "rank_pattern": {"qproj": 2}}, {}, "`rank_pattern` names 'qproj'"),
        ("bare", {"target_modules": ["q_proj"], "alpha_pattern": {"qproj": 2}}, {}, "`alpha_pattern` names 'qproj'"),
        ("bare", {"target_modules": ["q_proj"], "modules_to_save": ["head"]}, {}, "`modules_to_save` names 'head'"),
        (
            "bare", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate"]}, {},
            "`target_parameters` names 'mlp.experts.gate'",
        ),
        ("small", {"target_modules": "all-linear"}, {}, "tokenizer of another model"),
        ("bare", {"target_modules": "all-linear"}, {"top_k": 99_999}, "`top_k` is 99999"),
    ],
)  # fmt: skip
def test_a_model_by_name_is_checked_like_an_object(
    as_object, name, lora, fields, message, folder, tokenizer, dataset, config
):
    path = str(folder / name)
    model = AutoModelForCausalLM.from_pretrained(path) if as_object else path
    with pytest.raises(ValueError, match=message):
        make(model, config(**fields), dataset, tokenizer, LoraConfig(**lora))


@pytest.mark.parametrize("method", METHODS)
def test_the_tokenizer_beside_a_model_is_found(method, folder, dataset, settings, lora):
    chosen = METHODS[method]
    for model in (str(folder / "whole"), AutoModelForCausalLM.from_pretrained(folder / "whole")):
        args = settings(chosen.config, **chosen.fields, model_init_kwargs=None)
        trainer = chosen.trainer(model, args, train_dataset=dataset, peft_config=lora)
        assert trainer.processing_class.decode(trainer.train_dataset[0]["forget_ids"]).startswith("Oslo is")


def test_a_model_by_name_is_loaded_as_its_options_say(folder, dataset, tokenizer, config, lora):
    args = config(model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"})
    trainer = make(str(folder / "bare"), args, dataset, tokenizer, lora)
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert trainer.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("max_length", [1024, None, 14])
@pytest.mark.parametrize("novice", ["contexts", "counterfactual"])
def test_no_text_is_longer_than_the_model_has_positions(max_length, novice, tokenizer, config, lora, caplog):
    logging.getLogger("elm_trainer").addHandler(caplog.handler)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=48))
    long = "Oslo is in Norway and so is Bergen, they say. " * 9
    rows = build_erasure_dataset(
        {"capitals": ConceptSources([long], [[long]], [(long, long), ("Oslo", long)])}, size=4
    )
    rows = rows.map(lambda row: {"novices": [row["forget"].replace("Norway", "the Kingdom of Sweden")]})
    trainer = make(model, config(max_length=max_length, novice=novice), rows, tokenizer, lora)
    contexts = trainer.data_collator.longest_context()
    assert (contexts > 0) == (novice == "contexts")
    limit = min(48 - contexts, max_length or 48)
    assert max(map(len, trainer.train_dataset["forget_ids"])) == limit
    assert ("the model has 48 positions" in caplog.text) == (max_length != 14)
    trainer.train()


def test_contexts_that_leave_no_room_are_refused(tokenizer, dataset, config, lora):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=8))
    with pytest.raises(
        ValueError, match="the model has 8 positions, of which contexts take up to .* shorter contexts"
    ):
        make(model, config(), dataset, tokenizer, lora)


def test_texts_of_one_token_are_dropped_without_a_limit_too(tiny_model, tokenizer, config, lora):
    sources = ConceptSources(["a", "Oslo is in Norway."], [["The cat sat."]])
    rows = build_erasure_dataset({"capitals": sources}, size=4)
    trainer = make(tiny_model, config(max_length=None), rows, tokenizer, lora)
    assert {len(ids) > 1 for ids in trainer.train_dataset["forget_ids"]} == {True} and len(trainer.train_dataset) == 2


@pytest.mark.parametrize(
    ("changed", "name"), [({"learning_rate": 1e-3}, "learning_rate"), ({"seed": 7}, "seed"), ({"weight_decay": 0.1}, "weight_decay")]
)  # fmt: skip
def test_a_setting_that_a_checkpoint_would_override_is_named_on_resuming(
    changed, name, tiny_model, tokenizer, dataset, config, lora
):
    args = dict(save_strategy="steps", save_steps=1, max_steps=1)
    make(tiny_model, config(**args), dataset, tokenizer, lora).train()
    again = make(tiny_model.__class__(tiny_model.config), config(**{**args, **changed}), dataset, tokenizer, lora)
    with pytest.raises(ValueError, match=f"other settings .{name} changed"):
        again.train(resume_from_checkpoint=True)


def test_a_run_of_before_those_settings_were_kept_can_be_resumed(tiny_model, tokenizer, dataset, config, lora):
    args = dict(save_strategy="steps", save_steps=1, max_steps=1)
    make(tiny_model, config(**args), dataset, tokenizer, lora).train()
    file = Path(config().output_dir) / RUN_FILE
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in saved.items() if name not in KEPT}))
    again = make(tiny_model.__class__(tiny_model.config), config(**args), dataset, tokenizer, lora)
    again.train(resume_from_checkpoint=True)


def test_adapters_that_are_tuned_are_used(tiny_model, tokenizer, dataset, config, lora):
    collator = ElmDataCollator(tokenizer, concepts={"capitals": load_concept("capitals")})
    with pytest.raises(ValueError, match="`data_collator` brings contexts.*never used: leave its `concepts` out"):
        ElmTrainer(
            tiny_model, config(expert_steps=2), data_collator=collator, train_dataset=dataset,
            processing_class=tokenizer, peft_config=lora,
        )  # fmt: skip


def test_an_adapter_of_the_user_may_be_called_like_a_teacher(tiny_model, tokenizer, dataset, config, lora):
    model = get_peft_model(tiny_model, lora, adapter_name="expert")
    trainer = make(model, config(expert_steps=2, gradient_checkpointing=True), dataset, tokenizer)
    trainer.train()
    assert list(trainer.model.peft_config) == ["expert"] and trainer.model.active_adapter == "expert"
