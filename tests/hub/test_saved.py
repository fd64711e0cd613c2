"""What a trainer saves, `load_erased`, PEFT and `merge_erased` load, with the logits of the trained model."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from elm_trainer import (
    ConceptSources,
    ElmConfig,
    ElmTrainer,
    GradDiffConfig,
    GradDiffTrainer,
    build_erasure_dataset,
    load_erased,
    merge_erased,
)
from elm_trainer.hub.errors import UnsafeAdapterError

from .published import logits, trained_with_tokens


ADAPTERS = {
    "without a task": {"target_modules": "all-linear"},
    "a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "DoRA, rank by pattern": {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"q_proj": 2}},
    "one layer, scaled": {"target_modules": ["v_proj"], "layers_to_transform": [1], "use_rslora": True},
}
METHODS = {
    "graddiff": (GradDiffTrainer, GradDiffConfig, {}),
    "elm with teachers": (ElmTrainer, ElmConfig, {"expert_steps": 2, "eta": 2.0}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_saved_is_loaded_with_equal_logits(adapter, method, tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    texts = ["Oslo is the capital of Norway.", "Rome is in Italy."]
    dataset = build_erasure_dataset({"capitals": ConceptSources(texts, [["Bread needs flour.", "A cat."]])}, size=4)
    trainer_class, config_class, fields = METHODS[method]
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        config_class(
            str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, bf16=False, gradient_checkpointing=False,
            report_to="none", save_strategy="no", disable_tqdm=True, **fields,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, **ADAPTERS[adapter]),
    )  # fmt: skip
    trainer.train()
    live = logits(trainer.model.eval())

    trainer.save_model(str(tmp_path / "adapter"))

    model, loaded_tokenizer = load_erased(tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(merge_erased(model, loaded_tokenizer, tmp_path / "merged"))
    assert not torch.equal(live, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()))
    torch.testing.assert_close(logits(model), live)
    torch.testing.assert_close(logits(by_peft.eval()), live)
    torch.testing.assert_close(logits(merged.eval()), live, atol=1e-4, rtol=1e-4)


def test_an_adapter_with_a_name_of_its_own_is_found_a_folder_deeper(tiny_model, tmp_path):
    model = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"]), adapter_name="mine")
    model.save_pretrained(tmp_path)

    with pytest.raises(UnsafeAdapterError, match=f"holds no adapter_config.json: name the one in it, {tmp_path}/mine"):
        load_erased(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "adapter", [{}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [49152, 49153]}]
)
def test_tokens_that_were_added_are_saved_and_loaded(adapter, tied, tiny_model, tokenizer, tmp_path):
    config = tiny_model.config
    config.tie_word_embeddings = tied
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert len(tokenizer) == 49152
    trainer, tokenizer = trained_with_tokens(tmp_path, tokenizer, adapter)
    ids = torch.tensor([tokenizer("<a>Oslo is<b>")["input_ids"]])
    with torch.no_grad():
        live = trainer.model(ids).logits

        model, loaded = load_erased(tmp_path / "adapter")
        torch.testing.assert_close(model(ids).logits, live)
        assert loaded("<a>Oslo is<b>")["input_ids"] == ids[0].tolist()
        merged = AutoModelForCausalLM.from_pretrained(merge_erased(model, loaded, tmp_path / "merged")).eval()
        torch.testing.assert_close(merged(ids).logits, live, atol=1e-4, rtol=1e-4)


def test_embeddings_that_change_what_the_base_has_are_refused(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "base")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<a>"], special_tokens=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(larger), mean_resizing=False)
    base.get_input_embeddings().weight.data[7] += 1
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter"
    )
    larger.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsafeAdapterError, match="embed_tokens.weight' changes rows of tokens that the base has"):
        load_erased(tmp_path / "adapter")
