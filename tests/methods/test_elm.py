import pytest
import torch
from peft import LoraConfig

from benchmarks.targets import four_forwards
from elm_trainer import (
    Concept,
    ConceptSources,
    ElmConfig,
    ElmDataCollator,
    ElmTrainer,
    build_erasure_dataset,
    load_concept,
)

from .methods import tiny, trained


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", ["qwen2", "gemma"])
def test_further_model_shapes_train_whole(shape, checkpointing, tokenizer, dataset, config, lora):
    args = config(gradient_checkpointing=checkpointing)
    trainer = ElmTrainer(
        tiny(shape, len(tokenizer)), args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora
    )
    before = trained(trainer.model)
    trainer.train()
    assert [name for name, p in trained(trainer.model).items() if torch.equal(p, before[name])] == []


def test_the_loss_is_the_sum_of_its_weighted_terms(tiny_model, tokenizer, dataset, config, lora):
    args = config(erase_weight=0.5, retain_weight=2.0, consistency_weight=3.0, max_steps=1)
    trainer = ElmTrainer(tiny_model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    logged = trainer.state.log_history[0]
    terms = {"erase": 0.5, "retain": 2.0, "consistency": 3.0}
    assert logged["loss"] == pytest.approx(
        sum(weight * logged[f"{term}_loss"] for term, weight in terms.items()), 1e-3
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_ramp_is_that_of_the_released_code(side, tiny_model, tokenizer, dataset, config, lora):
    tokenizer.padding_side = side
    try:
        args = config(preset="released", precompute_targets=False)
        trainer = ElmTrainer(tiny_model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
        forget = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])["forget"]
    finally:
        tokenizer.padding_side = "right"

    # There, η of each logit is a linspace over the text, the first of which predicts the second token; the last one, which
    # predicts what no label says, has a target too.
    expected = [torch.linspace(1, 1000, length) for length in forget["lengths"]]
    torch.testing.assert_close(trainer._eta(forget), torch.cat(expected))
    target = trainer.target(trainer.model, "erase", trainer._prepare_inputs(forget))
    assert len(target["weights"]) == sum(forget["lengths"])


def test_a_collator_of_the_users_own_that_packs_nothing_trains_alike(tokenizer, dataset, config, lora):
    losses = []
    for own in (False, True):
        made = ElmDataCollator(tokenizer, concepts={"capitals": load_concept("capitals")}, past_end=True)
        trainer = ElmTrainer(
            tiny("llama", len(tokenizer)), config(precompute_targets=False),
            (lambda rows, made=made: made(rows)) if own else made,
            dataset, processing_class=tokenizer, peft_config=lora,
        )  # fmt: skip
        trainer.train()
        assert (made.packing is None) == own
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_without_erasure_the_first_step_has_no_gradient(tiny_model, tokenizer, dataset, config, lora):
    args = config(eta=0.0, top_k=len(tokenizer), consistency_weight=0.0, max_steps=1, max_grad_norm=0.0)
    lora.init_lora_weights = True
    trainer = ElmTrainer(tiny_model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = [p.grad.abs().max().item() for p in trainer.model.parameters() if p.requires_grad]
    assert max(gradients) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "fields",
    [{"contexts_per_sample": 2}, {"log_tokens": 3, "retain_loss": "log"}, {"preset": "released", "fact_share": 0.5}],
)
def test_live_targets_come_from_one_forward_and_are_those_of_four(
    fields, side, make_elm, dataset, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    trainer = make_elm(dataset, eta=3.0, precompute_targets=False, **{"eta_end": 5.0, **fields})
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    batches = {"erase": inputs["forget"], "retain": inputs["retain"]}
    expected, calls = four_forwards(trainer, batches), []
    handle = trainer.model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    made = trainer.targets(trainer.model, batches)
    handle.remove()
    assert len(calls) == 1
    assert {term: set(target) for term, target in made.items()} == {
        term: set(target) for term, target in expected.items()
    }
    for term, target in expected.items():
        for name, values in target.items():
            torch.testing.assert_close(made[term][name], values, rtol=1e-5, atol=1e-5)


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


def test_stored_targets_are_of_training_rows_and_evaluation_makes_its_own(tokenizer, dataset, config, lora):
    losses = []
    for precompute in (False, True):
        trainer = ElmTrainer(
            tiny("llama", len(tokenizer)),
            config(precompute_targets=precompute, eta=5.0),
            train_dataset=dataset.select([2, 1]),
            eval_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_weight_of_zero_skips_the_term_and_its_reference_forward(tiny_model, tokenizer, dataset, config, lora):
    args = config(erase_weight=0.0, retain_weight=0.0, max_steps=1)
    trainer = ElmTrainer(tiny_model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    trainer.packed.final_logits(trainer.model)  # measured once for all steps
    trainer.packed.texts_interact(trainer.model)
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
        (
            {"erase_weight": 0.0, "retain_weight": 0.0, "consistency_weight": 0.0},
            "All of `state_weight`, `erase_weight`, `retain_weight`, `consistency_weight` are 0: raise one",
        ),
    ],
)
def test_a_bad_setting_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        ElmConfig("unused", bf16=False, **fields)


def test_consistency_alone_without_synthetic_pairs_is_refused(tiny_model, tokenizer, config, lora):
    dataset = build_erasure_dataset({"capitals": ConceptSources(["Oslo is the capital."], [["The cat."]])})
    args = config(erase_weight=0.0, retain_weight=0.0)
    trainer = ElmTrainer(tiny_model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    with pytest.raises(ValueError, match="`consistency_weight` alone is above 0, but a batch has no synthetic pairs"):
        trainer.train()


def test_throw_away_adapters_and_evaluation_during_training_exclude_each_other(
    tiny_model, tokenizer, dataset, config, lora
):
    with pytest.raises(ValueError, match="`eval_dataset` is given with `expert_steps=2`"):
        ElmTrainer(
            tiny_model, config(expert_steps=2), train_dataset=dataset, eval_dataset=dataset,
            processing_class=tokenizer, peft_config=lora,
        )  # fmt: skip


def test_top_k_beyond_the_vocabulary_is_refused(tiny_model, tokenizer, dataset, config, lora):
    with pytest.raises(ValueError, match="`top_k` is 99999, but the vocabulary has"):
        ElmTrainer(
            tiny_model, config(top_k=99999), train_dataset=dataset, processing_class=tokenizer, peft_config=lora
        )


@pytest.mark.parametrize(
    ("concept", "concepts", "word"),
    [
        ("cookery", None, "expert on cookery,"),
        ("cookery", ["cookery: soups"], "expert on soups,"),
        (Concept("cookery", ["soups", "stews"]), None, "expert on soups, stews,"),
        (Concept("cookery"), None, "expert on cookery,"),
    ],
)
def test_a_concept_of_ones_own_needs_no_file(tiny_model, tokenizer, config, lora, concept, concepts, word):
    rows = build_erasure_dataset(
        {concept: ConceptSources(["Stir the soup."], [["The cat."]]), "capitals": ConceptSources(["Oslo."], [["A."]])}
    )
    args = config(max_steps=1, concepts=concepts and [*concepts, "capitals"])
    trainer = ElmTrainer(tiny_model, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    assert any(word in context for context in trainer.data_collator.concepts["cookery"].expert_contexts)
    assert trainer.data_collator.concepts["capitals"] == load_concept("capitals")


def test_a_mistyped_preset_in_the_dataset_lists_the_presets(tiny_model, tokenizer, config, lora):
    dataset = build_erasure_dataset({"capitols": ConceptSources(["Stir the soup."], [["The cat."]])})
    with pytest.raises(ValueError, match=r"'capitols', neither a preset \(bio, .*did you mean 'capitals'"):
        ElmTrainer(tiny_model, config(), train_dataset=dataset, processing_class=tokenizer, peft_config=lora)


def test_lora_of_released_size_is_accepted(tiny_model, tokenizer, dataset, config):
    lora = LoraConfig(r=256, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj"], layers_to_transform=[0])
    trainer = ElmTrainer(
        tiny_model, config(preset="released", max_steps=1), train_dataset=dataset, processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    trainer.train()
    assert all(".0." in name for name in trained(trainer.model))
