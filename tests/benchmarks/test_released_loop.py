import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.released_loop import ReleasedSample, released_target, released_updates, tokenize_samples
from benchmarks.sides import short_texts
from elm_trainer import ElmConfig, ElmTrainer, load_concept
from elm_trainer.objectives import erasure_target, ramped_eta

from ..like import byte_level


@pytest.fixture
def samples(tokenizer):
    return tokenize_samples(list(short_texts(3, words=4)), load_concept("capitals"), tokenizer)


@pytest.mark.parametrize("eta_end", [1.0, 20.0, 1000.0])
def test_the_released_target_is_the_one_that_we_train_on(eta_end):
    torch.manual_seed(0)
    length, top_k = 9, 5
    base, expert, novice = torch.randn(3, length, 50)
    indices, probs = released_target(base, expert, novice, eta=1.0, eta_end=eta_end, tau=1.2, top_k=top_k)

    eta = ramped_eta(torch.arange(length), torch.tensor(length), 1.0, eta_end)
    ours = erasure_target(base, expert, novice, eta=eta, temperature=1.2, top_k=top_k)
    assert torch.equal(indices, ours.indices)
    # Ours is in float32, whose rounding η multiplies.
    assert torch.allclose(probs.float(), ours.probs, atol=max(1e-6, 1e-6 * eta_end))


def test_the_released_target_grows_along_the_text():
    torch.manual_seed(0)
    base, expert, novice = torch.randn(3, 5, 50)
    _, probs = released_target(base, expert, novice, eta=0.0, eta_end=40.0, tau=1.0, top_k=50)
    # Five tokens, of which the last predicts what no label says.
    for place, eta in ((0, 0.0), (1, 10.0), (4, 40.0)):
        flat = released_target(base, expert, novice, eta=eta, eta_end=eta, tau=1.0, top_k=50)[1]
        assert torch.allclose(probs[place], flat[place])
    assert not torch.allclose(probs[0], flat[0], atol=1e-2)


def test_a_sample_has_its_text_alone_and_behind_either_context(tokenizer, samples):
    row = short_texts(3, words=4)[0]
    assert tokenizer.decode(samples[0].forget) == row["forget"]
    concept = load_concept("capitals")
    for ids, contexts in (
        (samples[0].expert, concept.expert_contexts),
        (samples[0].novice, concept.novice_contexts),
    ):
        context, text = tokenizer.decode(ids).split("\n")
        assert context in contexts and text == row["forget"]
    pair = samples[0].synthetic
    assert tokenizer.decode(pair[samples[0].completion_start :]) == row["completion"]


def test_the_loop_moves_the_adapter_alone_and_ends_when_told(shape, adapter, samples):
    torch.manual_seed(0)
    model = get_peft_model(shape.model(), adapter.lora())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    updates = []
    released_updates(
        model, samples, learning_rate=1e-2, accumulation=2, on_update=lambda: updates.append(1) or len(updates) < 3
    )
    assert len(updates) == 3
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def texts():
    """Rows of two concepts in the order of the released run: first, first, second."""
    first, second = list(short_texts(54, words=9)), list(short_texts(27, words=9, seed=1))
    return [
        row | {"concept": name}
        for turn in range(27)
        for name, row in (("bio", first[2 * turn]), ("bio", first[2 * turn + 1]), ("cyber", second[turn]))
    ][:80]


def faithful_trainer(folder, texts, tokenizer, model, lora):
    """Our trainer as the recipes of the released run set it, but for the sizes of model and adapter."""
    return ElmTrainer(
        model,
        ElmConfig(
            output_dir=str(folder), preset="released", faithful=True, concepts=["bio", "cyber"],
            per_device_train_batch_size=1, gradient_accumulation_steps=4, train_sampling_strategy="sequential",
            num_train_epochs=1, learning_rate=5e-5, weight_decay=0.01, adam_epsilon=2.5e-9,
            lr_scheduler_type="constant", max_grad_norm=0.0, bf16=False, use_cpu=True, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(texts), processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip


def test_twenty_steps_of_our_trainer_are_those_of_the_released_loop(texts, tmp_path):
    tokenizer = byte_level("<s> $A", ("<s>", "</s>"), bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=None, initializer_range=0.2,
    )  # fmt: skip
    model = MistralForCausalLM(config).float()
    # Without dropout, whose draws differ, since we run the texts of a step in one forward.
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, layers_to_transform=[1, 2],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    trainer = faithful_trainer(tmp_path, texts, tokenizer, copy.deepcopy(model), lora)
    ours = dict(trainer.model.named_parameters())
    released = get_peft_model(model, lora)
    released.load_state_dict({name: value.clone() for name, value in trainer.model.state_dict().items()})
    before = {name: value.clone() for name, value in ours.items() if value.requires_grad}

    assert trainer.data_collator.targets is not None  # stored, since each row is visited once
    # The contexts of a row are drawn at random there, and as the collator draws them here.
    collator = replace(trainer.data_collator, targets=None)
    batches = [collator([row]) for row in trainer.train_dataset]
    samples = [
        ReleasedSample(
            forget=row["forget_ids"], retain=row["retain_ids"], synthetic=row["synthetic_ids"],
            expert=batch["forget"]["expert"]["input_ids"][0].tolist(),
            novice=batch["forget"]["novice"]["input_ids"][0].tolist(),
            completion_start=row["completion_start"],
        )
        for row, batch in zip(trainer.train_dataset, batches, strict=True)
    ]  # fmt: skip
    losses, updates = [], []
    released_updates(
        released, samples, on_update=lambda: updates.append(1) or len(updates) < 20,
        on_losses=lambda *terms: losses.append(terms),
    )  # fmt: skip
    trainer.train()

    expected = torch.tensor(losses).view(20, 4, 3).mean(1)
    found = torch.tensor(
        [
            [entry[f"{term}_loss"] for term in ("erase", "retain", "consistency")]
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    theirs = dict(released.named_parameters())
    for name, start in before.items():
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
        assert (ours[name] - start).abs().max() > 5e-4, name
