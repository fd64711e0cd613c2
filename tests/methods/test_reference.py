"""The reference is the untouched base, whatever the adapter is, or the run is refused."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from elm_trainer.evaluation.pair import ModelPair

from .methods import METHODS, tiny, trained


LINEAR = ["q_proj", "v_proj", "gate_proj", "up_proj"]
IDS = torch.tensor([[5, 8, 13, 21, 34, 55]])


@pytest.fixture
def make(settings, tokenizer, dataset):
    def make(model, peft_config=None, method="graddiff", **fields):
        chosen = METHODS[method]
        return chosen.trainer(
            model, settings(chosen.config, **{**chosen.fields, **fields}), train_dataset=dataset,
            processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip

    return make


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


KEEPS_IT = {
    "lora": LoraConfig(r=4, target_modules="all-linear"),
    "gaussian": LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="gaussian"),
    "orthogonal": LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="orthogonal"),
    "rslora": LoraConfig(r=4, target_modules=LINEAR, use_rslora=True),
    "dora": LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "saved head": LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=4, target_modules=LINEAR, trainable_token_indices=[5, 8]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj"]),
    "loha": LoHaConfig(r=4, target_modules=LINEAR),
    "lokr": LoKrConfig(r=4, target_modules=LINEAR),
    "boft": BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", KEEPS_IT)
def test_the_reference_is_the_base_before_and_after_training(name, make, tokenizer):
    model = tiny("llama", len(tokenizer))
    base = logits(model)
    trainer = make(model, KEEPS_IT[name])
    torch.testing.assert_close(logits(trainer.model), base, rtol=1e-4, atol=1e-4)
    trainer.train()
    with trainer.reference(trainer.model):
        torch.testing.assert_close(logits(trainer.model), base, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(trainer.model), base)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, "rewrites the base's weights .*'pissa'.*leave `init_lora_weights` at True"),
        ({"init_lora_weights": "olora"}, "rewrites the base's weights .*'olora'"),
        ({"init_lora_weights": False}, "changes the model before training"),
        ({"bias": "all"}, "`bias` is 'all'.*set `bias` to 'none'"),
        ({"bias": "lora_only"}, "`bias` is 'lora_only'.*set `bias` to 'none'"),
    ],
)
def test_an_adapter_that_leaves_no_reference_is_refused(method, fields, message, make, tokenizer):
    model = tiny("gpt2", len(tokenizer))
    with pytest.raises(ValueError, match=message):
        make(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, **fields), method)


@pytest.mark.parametrize("kind", ["pissa", "trained before", "beside another", "both active"])
def test_a_model_that_brings_an_adapter_must_start_at_its_reference(kind, make, tokenizer):
    start = {"pissa": "pissa", "trained before": False}.get(kind, True)
    config = LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=start)
    model = get_peft_model(tiny("llama", len(tokenizer)), config)
    if kind in ("beside another", "both active"):
        other = LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False)
        model.add_adapter("sft", other)
        if kind == "both active":
            model.base_model.set_adapter(["default", "sft"])
        else:
            # Not active, so it is no part of the model: the base is the reference, and the start is the base.
            make(model).train()
            return
    with pytest.raises(ValueError, match=r"changes the model before training.*merge_and_unload\(\)"):
        make(model)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused_by_name(config, make, tokenizer):
    with pytest.raises(ValueError, match=f"`peft_config` is a {config.__name__}, which puts tokens before every text"):
        make(tiny("llama", len(tokenizer)), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model = get_peft_model(tiny("llama", len(tokenizer)), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match=f"`peft_config` is a {config.__name__}"):
        make(model)


def test_an_adapter_that_plans_its_ranks_by_the_run_is_told_from_the_reference(make, tokenizer):
    # AdaLoRA starts at its base too, its matrices E being 0.
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=2, target_modules=LINEAR)
    trainer = make(tiny("llama", len(tokenizer)), config)
    with trainer.reference(trainer.model):
        reference = logits(trainer.model)
    torch.testing.assert_close(logits(trainer.model), reference)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_what_the_user_froze_stays_frozen(method, stored, make, tokenizer, tmp_path):
    model = get_peft_model(tiny("llama", len(tokenizer)), LoraConfig(r=4, target_modules="all-linear"))
    frozen = {name: p for name, p in model.named_parameters() if "lora_A" in name}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in frozen.items()}
    switch = {"elm": "precompute_targets", "npo": "precompute_ref_log_probs"}.get(method)
    trainer = make(model, None, method, **({switch: stored, "targets_dir": str(tmp_path)} if switch else {}))
    trainer.train()
    assert [name for name, p in frozen.items() if p.requires_grad or not torch.equal(p, before[name])] == []
    assert any(p.any() for name, p in trained(trainer.model).items() if "lora_B" in name)


def test_measuring_the_reference_leaves_what_was_frozen_frozen(tiny_peft_model):
    for name, parameter in tiny_peft_model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    with ModelPair(tiny_peft_model).use("reference"):
        pass
    assert not any(p.requires_grad for name, p in tiny_peft_model.named_parameters() if "lora_A" in name)
    assert all(p.requires_grad for name, p in tiny_peft_model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (KEEPS_IT["lora"], None),
        (KEEPS_IT["dora"], None),
        (KEEPS_IT["tokens"], None),
        (KEEPS_IT["ia3"], "`peft_type` is 'IA3'"),
        (LoraConfig(r=4, target_modules=LINEAR, use_qalora=True, qalora_group_size=8), "`use_qalora` is True"),
    ],
)
def test_what_load_erased_would_refuse_is_said_before_training(config, refused, make, tokenizer, caplog):
    with caplog.at_level("WARNING", logger="elm_trainer.methods.validation"):
        make(tiny("llama", len(tokenizer)), config)
    said = [
        record.message
        for record in caplog.records
        if "`load_erased` and `publish_adapter` will refuse" in record.message
    ]
    assert len(said) == bool(refused) and all(refused in message for message in said)
