import math

import pytest
import torch
from peft import LoraConfig
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from elm_trainer import ConceptSources, ElmConfig, ElmTrainer, build_erasure_dataset


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SHAPES = {
    "llama": (LlamaForCausalLM, LlamaConfig, SMALL | {"num_key_value_heads": 2}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SMALL | {"num_key_value_heads": 2}),
    "gemma": (GemmaForCausalLM, GemmaConfig, SMALL | {"num_key_value_heads": 1, "head_dim": 8}),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, SMALL),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}


def tiny(shape, vocabulary):
    torch.manual_seed(0)
    model_class, config_class, sizes = SHAPES[shape]
    return model_class(config_class(vocab_size=vocabulary, **sizes))


def adapter(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_adapter_matrix_moves_in_two_steps(shape, checkpointing, tokenizer, dataset, config, lora):
    args = config(gradient_checkpointing=checkpointing)
    trainer = ElmTrainer(
        tiny(shape, len(tokenizer)), args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora
    )
    before = adapter(trainer)
    trainer.train()
    assert [name for name, p in adapter(trainer).items() if torch.equal(p, before[name])] == []
    logged = trainer.state.log_history[0]
    assert all(math.isfinite(logged[f"{term}_loss"]) for term in ("erase", "retain", "consistency"))
    assert logged["loss"] == pytest.approx(sum(logged[f"{t}_loss"] for t in ("erase", "retain", "consistency")), 1e-3)


def test_bf16_autocast_trains(tiny_model, tokenizer, dataset, config, lora):
    trainer = ElmTrainer(
        tiny_model,
        config(bf16=True, use_cpu=True),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    before = adapter(trainer)
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in adapter(trainer).items())


def test_without_erasure_the_first_step_has_no_gradient(tiny_model, tokenizer, dataset, config, lora):
    args = config(eta=0.0, top_k=len(tokenizer), consistency_weight=0.0, max_steps=1, max_grad_norm=0.0)
    lora.init_lora_weights = True
    trainer = ElmTrainer(tiny_model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = [p.grad.abs().max().item() for p in trainer.model.parameters() if p.requires_grad]
    assert max(gradients) < 1e-6


def test_accumulated_single_texts_give_the_gradient_of_one_batch(tokenizer, dataset, config, lora):
    weights = []
    for batch, steps in ((4, 1), (1, 4)):
        args = config(per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1)
        trainer = ElmTrainer(
            tiny("llama", len(tokenizer)), args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora
        )
        trainer.train()
        weights.append((trainer.state.log_history[0]["grad_norm"], trainer.state.log_history[0]["loss"]))
    assert weights[0] == pytest.approx(weights[1], rel=1e-3)


def test_padding_side_does_not_change_the_loss(tokenizer, dataset, config, lora):
    losses = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        try:
            trainer = ElmTrainer(
                tiny("gpt2", len(tokenizer)).eval(),
                config(),
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=lora,
            )
            trainer.model.eval()
            batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
            losses.append(trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item())
        finally:
            tokenizer.padding_side = "right"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_stored_targets_give_the_losses_of_targets_made_in_the_step(tokenizer, dataset, config, lora):
    losses = []
    for precompute in (False, True):
        trainer = ElmTrainer(
            tiny("llama", len(tokenizer)),
            config(precompute_targets=precompute, contexts_per_sample=2, plausibility=0.01, fact_share=0.5, eta=5.0),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_weight_of_zero_skips_the_term_and_its_reference_forward(tiny_model, tokenizer, dataset, config, lora):
    args = config(erase_weight=0.0, retain_weight=0.0, max_steps=1)
    trainer = ElmTrainer(tiny_model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    calls = []
    tiny_model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 1
    assert "erase_loss" not in trainer.state.log_history[0] and "consistency_loss" in trainer.state.log_history[0]


def test_teachers_serve_the_targets_and_leave_no_trace(tiny_model, tokenizer, config, lora):
    dataset = build_erasure_dataset(
        {"capitals": ConceptSources("capitals", ["capitals-near"])}, size=8, processing_class=tokenizer
    )
    base = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    trainer = ElmTrainer(
        tiny_model,
        config(expert_steps=2, novice_steps=2, eta=2.0),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    assert list(trainer.model.peft_config) == ["default"]
    assert not any("expert" in name or "novice" in name for name, _ in trainer.model.named_parameters())
    trainer.train()
    for name, p in trainer.model.get_base_model().named_parameters():
        if "lora_" not in name:
            torch.testing.assert_close(p, base[name.replace(".base_layer", "")], rtol=0, atol=0)


def test_an_adapter_is_continued(tiny_peft_model, tokenizer, dataset, config):
    trainer = ElmTrainer(tiny_peft_model, config(), train_dataset=dataset, processing_class=tokenizer)
    before = adapter(trainer)
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in adapter(trainer).items())


def test_evaluation_during_training_logs_the_terms(tiny_model, tokenizer, dataset, config, lora):
    args = config(eval_strategy="steps", eval_steps=1, max_steps=1)
    trainer = ElmTrainer(
        tiny_model, args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    assert any({"eval_loss", "eval_erase_loss"} <= set(entry) for entry in trainer.state.log_history)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_preset_fills_what_is_left_out_and_a_field_overrides_it(preset, config):
    assert config(preset=preset).eta_end == {"paper": 500.0, "released": 1000.0}[preset]
    assert config(preset=preset).retain_loss == {"paper": "kl", "released": "argmax"}[preset]
    overridden = config(preset=preset, eta=7.0, retain_loss="kl")
    assert (overridden.eta, overridden.eta_end, overridden.retain_loss) == (7.0, 7.0, "kl")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eta": -1.0}, "`eta` is -1.0: it must be at least 0"),
        ({"tau": 0.0}, "`tau` is 0.0: it must be above 0"),
        ({"top_k": 0}, "`top_k` is 0: it must be at least 1"),
        ({"plausibility": 2.0}, "`plausibility` is 2.0"),
        ({"preset": "mine"}, "`preset` is 'mine': use one of paper, released"),
        ({"retain_loss": "mse"}, "`retain_loss` is 'mse'"),
        ({"novice_steps": 5}, "`novice_steps` is 5 without an expert"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        ElmConfig("unused", bf16=False, **fields)


def test_top_k_beyond_the_vocabulary_is_refused(tiny_model, tokenizer, dataset, config, lora):
    with pytest.raises(ValueError, match="`top_k` is 99999, but the vocabulary has"):
        ElmTrainer(
            tiny_model, config(top_k=99999), train_dataset=dataset, processing_class=tokenizer, peft_config=lora
        )


def test_an_unknown_concept_in_the_dataset_lists_the_presets(tiny_model, tokenizer, config, lora):
    dataset = build_erasure_dataset({"cookery": ConceptSources(["Stir the soup."], [["The cat."]])})
    with pytest.raises(ValueError, match="'cookery', which is no preset; use one of bio"):
        ElmTrainer(tiny_model, config(), train_dataset=dataset, processing_class=tokenizer, peft_config=lora)


def test_lora_of_released_size_is_accepted(tiny_model, tokenizer, dataset, config):
    lora = LoraConfig(r=256, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj"], layers_to_transform=[0])
    trainer = ElmTrainer(
        tiny_model, config(preset="released", max_steps=1), train_dataset=dataset, processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    trainer.train()
    assert all(".0." in name for name in adapter(trainer))
