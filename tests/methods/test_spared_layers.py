"""A step runs the layers that it must: frozen ones once for each text, and none above the last one that is read."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from elm_trainer import ElmConfig, ElmTrainer
from elm_trainer.modeling import lora_config


DEPTH = 5
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)  # fmt: skip
SHAPES = {
    "llama": SIZES,
    "qwen2": SIZES,
    # Layers of two kinds, each with its own mask and rotary embedding.
    "gemma3_text": SIZES | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]},
    "gpt2": dict(n_embd=32, n_layer=DEPTH, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": {key: SIZES[key] for key in list(SIZES)[:4]},
}  # fmt: skip
STATES = dict(
    novice="counterfactual", erase_weight=0.0, state_weight=1.0, state_layers=[3], state_eta=1.5, retain_loss="states",
    consistency_weight=0.0, max_steps=6, fact_share=0.3,
)  # fmt: skip


@pytest.fixture
def make(tokenizer, rows, settings):
    def make(shape="llama", model=(), **fields):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[shape](vocab_size=len(tokenizer), **(SHAPES[shape] | dict(model)))
        model = AutoModelForCausalLM.from_config(config)
        return ElmTrainer(
            model, settings(ElmConfig, **(STATES | fields)), train_dataset=rows, processing_class=tokenizer,
            peft_config=lora_config(model, rank=4, layers="2-3"),
        )  # fmt: skip

    return make


def run(trainer):
    """Losses of each step, trained weights, and how often a module within each layer ran."""
    model = trainer.model.get_base_model()
    layers = getattr(model.get_decoder(), "layers", None) or model.transformer.h
    calls = [0] * DEPTH

    def count(number):
        calls[number] += 1

    for number, layer in enumerate(layers):
        next(layer.children()).register_forward_hook(lambda *_, number=number: count(number))
    trainer.train()
    losses = [
        [entry[f"{term}_loss"] for term in ("state", "erase", "retain") if f"{term}_loss" in entry]
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return losses, [weight.detach().clone() for weight in trainer.model.parameters() if weight.requires_grad], calls


@pytest.mark.parametrize(
    ("shape", "side", "checkpointing"),
    [*((shape, "right", False) for shape in SHAPES), ("llama", "left", False), ("gemma3_text", "right", True)],
)
def test_training_is_the_same_whether_states_are_kept_or_not(shape, side, checkpointing, make, tokenizer):
    tokenizer.padding_side, before = side, tokenizer.padding_side
    options = dict(gradient_checkpointing=checkpointing, pad_to_multiple_of=8)
    try:
        kept, trained, calls = run(make(shape, keep_states=True, **options))
        full, expected, all_calls = run(make(shape, keep_states=False, **options))
    finally:
        tokenizer.padding_side = before
    assert len(kept) == 6 and kept != [kept[0]] * 6
    for one, other in zip(kept, full, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for one, other in zip(trained, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    # Six rows in batches of four: both of the first batches bring new texts, the third may. Two forwards measure it, and one more
    # measures whether texts interact.
    assert calls[0] == calls[1] < all_calls[0]
    assert calls[2] == calls[3] > calls[4] > 0
    assert all_calls[4] < all_calls[0]  # what nobody reads is left out in any case


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("shape", "side"), [*((shape, "right") for shape in SHAPES), ("llama", "left")])
def test_targets_are_the_same_where_texts_share_what_they_begin_with(shape, side, bf16, make, tokenizer, monkeypatch):
    monkeypatch.setattr("elm_trainer.data.packing._SHARING_ROW", 24)  # several rows, with gaps
    monkeypatch.setattr("elm_trainer.data.packing._SHARED", 2.0)  # though that spares nothing
    options = {"sliding_window": 64} if shape == "gemma3_text" else {}  # a shorter window rules such a mask out
    tokenizer.padding_side, before = side, tokenizer.padding_side
    try:
        options_of_run = dict(precompute_targets=False, fact_share=0.0, pad_to_multiple_of=8, bf16=bf16, use_cpu=bf16)
        trainer = make(shape, options, **options_of_run)
        found, packed = [], []
        for sharing in (True, False):
            rows = list(trainer.train_dataset)
            inputs = trainer.on_device(trainer.data_collator(rows + rows[:2]), sharing=sharing)
            packed += inputs["forget"].get("packings", [])
            batches = {"erase": inputs["forget"], "retain": inputs["retain"]}
            with torch.no_grad(), trainer.accelerator.autocast():
                found.append(trainer.targets(trainer.model, batches))
    finally:
        tokenizer.padding_side = before
    # Rounding in bfloat16 has the oldest torch take texts of a row for such that see each other: then each has its own.
    assert len(packed) == 1 or (bf16 and torch.__version__.startswith("2.6."))
    assert all(packing.seen is not None and len(packing.tokens) > 1 for packing in packed)
    for term, target in found[1].items():
        for name, expected in target.items():
            tolerance = (0.05 if bf16 else 1e-5) * expected.abs().max().item()
            torch.testing.assert_close(found[0][term][name], expected, rtol=0, atol=tolerance, msg=f"{term}, {name}")


def test_states_are_kept_by_default_where_no_term_reads_logits_and_texts_come_again(make):
    calls = run(make(max_steps=12))[2]
    assert calls[0] < calls[2] - 6
    for fields in (dict(retain_loss="log"), dict(max_steps=1)):
        calls = run(make(**fields))[2]
        assert calls[0] >= calls[2] > 0


def test_no_more_is_kept_than_there_is_room_for(make, monkeypatch):
    monkeypatch.setattr("elm_trainer.methods.elm_layers.LIMIT", 5000)
    little = run(make())
    monkeypatch.undo()
    plenty = run(make())
    assert little[2][0] > plenty[2][0]
    for one, other in zip(little[0], plenty[0], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_what_cannot_be_kept_is_refused_only_where_it_is_asked_for(make):
    dropout = dict(attention_dropout=0.1)
    with pytest.raises(ValueError, match="`keep_states` is True, but frozen layers have dropout"):
        make(model=dropout, keep_states=True)
    assert run(make(model=dropout))[2][0] >= 6


def test_layers_whose_output_changes_otherwise_run_in_each_step(make, caplog):
    trainer, seen = make(max_steps=12), []
    layer = trainer.model.get_base_model().model.layers[3]
    layer.register_forward_hook(lambda _, args, output: seen.append(output) or output * (1 + 0.1 * len(seen)))
    logger = logging.getLogger("elm_trainer")
    logger.addHandler(caplog.handler)
    calls = run(trainer)[2]
    assert (
        "LlamaDecoderLayer gives something else where layers stand aside, so each step runs all of them" in caplog.text
    )
    assert calls[0] >= calls[2] >= 12


LATE = dict(erase_weight=0.5, erase_after=0.6, eta=1.0, log_tokens=4, max_steps=10)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_the_erase_term_takes_the_place_of_the_state_term(kept, stored, make):
    fields = LATE | dict(precompute_targets=stored, keep_states=kept, learning_rate=1e-2)
    trainer = make(**fields)
    losses, trained, calls = run(trainer)
    for step, entry in enumerate(entry for entry in trainer.state.log_history if "loss" in entry):
        assert ("state_loss" in entry, "erase_loss" in entry) == (step < 6, step >= 6)
        erased = entry["state_loss"] if step < 6 else 0.5 * entry["erase_loss"]
        assert entry["loss"] == pytest.approx(erased + entry["retain_loss"], rel=1e-3)
    # Up to there it is the run without an erase term.
    before, _, _ = run(make(precompute_targets=stored, keep_states=kept, learning_rate=1e-2, max_steps=10))
    for one, other in zip(losses[:6], before[:6], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    # Targets that are made in the step run all layers where they have to read logits; else the first six steps run none above.
    assert calls[4] < calls[2] - 4
    assert any(weight.abs().max() > 0 for weight in trained)


def test_training_with_both_terms_is_the_same_whether_states_are_kept_or_not(make):
    (kept, trained, calls), (full, expected, all_calls) = (
        run(make(keep_states=keep, learning_rate=1e-2, **LATE)) for keep in (True, False)
    )
    for one, other in zip(kept, full, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for one, other in zip(trained, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert calls[0] < all_calls[0]


def test_a_resumed_run_has_the_erase_term_where_the_whole_run_has_it(make, tmp_path):
    fields = LATE | dict(learning_rate=1e-2, save_strategy="steps", save_steps=7, output_dir=str(tmp_path))
    whole = make(**fields)
    whole.train()
    again = make(**fields)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    ends = [trainer.state.log_history[-2] for trainer in (whole, again)]
    assert ends[0]["step"] == ends[1]["step"] == 10
    for name in ("loss", "erase_loss", "retain_loss"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-4)


def test_retain_text_is_held_in_log_space_too_where_a_step_has_an_erase_term(make):
    trainer = make(**LATE, log_retain=2.0, precompute_targets=False)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    rows = [trainer.train_dataset[index] for index in range(4)]
    expected = []
    for row in rows:
        ids = torch.tensor([row["retain_ids"]])
        with torch.no_grad():
            adapted = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            with trainer.model.disable_adapter():
                reference = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        moved = adapted - reference
        spread = ((moved - moved.mean(-1, keepdim=True)) ** 2).mean(-1)
        expected.append((-(reference.exp() * moved).sum(-1) + spread / 2).mean())
    trainer.state.max_steps, found = 10, {}
    for step, weight in ((5, 0.0), (5, 2.0), (6, 0.0), (6, 2.0)):
        trainer.state.global_step, trainer.args.log_retain = step, weight
        found[step, weight] = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    assert found[5, 2.0] == found[5, 0.0]
    added = 2 * trainer.args.retain_weight * torch.stack(expected).mean().item()
    assert found[6, 2.0] - found[6, 0.0] == pytest.approx(added, rel=1e-3) and added > 1e-3


def test_stored_states_hold_retain_text_in_log_space_as_live_ones_do(make, monkeypatch):
    # Stored in float16, states give losses that are up to a hundredth off: without rounding they are to be the same.
    encode = "elm_trainer.data.target_store.encode_states"
    monkeypatch.setattr(encode, lambda states: torch.nn.functional.pad(states, (0, 1)))
    losses = [
        run(make(**LATE, log_retain=3.0, precompute_targets=stored, learning_rate=1e-2))[0] for stored in (True, False)
    ]
    plain = run(make(**LATE, learning_rate=1e-2))[0]
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert losses[0][:6] == plain[:6] and losses[0][6] != plain[6]


@pytest.mark.parametrize(
    "fields", [{"retain_loss": "log"}, {"erase_weight": 0.0, "erase_after": 0.0}, {"retain_weight": 0.0}]
)
def test_log_space_is_added_to_a_retain_term_of_states_alone(fields, make):
    with pytest.raises(
        ValueError, match='`log_retain` is 1.0 with `retain_loss=.*set `retain_loss="states"` and both'
    ):
        make(**(LATE | {"log_retain": 1.0} | fields))


@pytest.mark.parametrize("fields", [{"erase_weight": 0.0}, {"state_weight": 0.0, "retain_loss": "log"}])
def test_a_share_without_both_terms_is_refused(fields, make):
    with pytest.raises(ValueError, match="`erase_after` is 0.6 with `state_weight=.*give both a weight"):
        make(**(LATE | fields))
    with pytest.raises(ValueError, match="`erase_after` is 1.5: it must be from 0 to 1"):
        make(**(LATE | {"erase_after": 1.5}))
