import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from elm_trainer import ElmDataCollator
from elm_trainer.methods.forward import nll_reading
from elm_trainer.methods.likelihood import NpoConfig, NpoTrainer, npo_loss, sequence_nll

from .by_hand import assert_same_gradients, batch_of, column_nlls, gradients
from .methods import tiny


ROWS = range(3)
NLLS = torch.tensor([0.0, 1e-3, 3.0, 40.0, 5000.0], dtype=torch.float64)


@pytest.fixture
def make(tiny_model, tokenizer, dataset, settings, lora):
    def make(model=tiny_model, eval_dataset=None, **fields):
        return NpoTrainer(
            model, settings(NpoConfig, **fields), train_dataset=dataset, eval_dataset=eval_dataset,
            processing_class=tokenizer, peft_config=lora,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 7.0])
def test_at_the_reference_the_loss_is_two_log_two_over_beta_and_its_gradient_that_of_ascent(beta):
    nll = NLLS.clone().requires_grad_()
    loss = npo_loss(nll, NLLS, beta)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.full_like(NLLS, 2 * math.log(2) / beta), rtol=0, atol=1e-6)
    torch.testing.assert_close(nll.grad, -torch.ones_like(NLLS), rtol=0, atol=1e-6)


@examples(deadline=None)
@given(st.floats(0, 200), st.floats(0, 200), st.floats(0.01, 3))
def test_the_loss_is_the_papers_power_of_the_probability_ratio(nll, reference, beta):
    made = npo_loss(torch.tensor(nll, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64), beta).item()
    assert made == pytest.approx(2 / beta * math.log1p(math.exp(beta * (reference - nll))), rel=1e-6, abs=1e-6)


def test_a_small_beta_is_gradient_ascent_and_a_large_one_a_hinge():
    reference = torch.full_like(NLLS, 3.5)
    # Up to terms of the order of β times the square of the difference.
    ascent = npo_loss(NLLS, reference, 1e-9) - 2 * math.log(2) / 1e-9
    torch.testing.assert_close(ascent, reference - NLLS, rtol=1e-5, atol=1e-5)
    hinge = 2 * (reference - NLLS).clamp(min=0)
    torch.testing.assert_close(npo_loss(NLLS, reference, 1e4), hinge, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [-1e6, 1e6])
def test_very_long_texts_neither_overflow_nor_lose_their_gradient(gap, dtype):
    nll = torch.tensor(1e6 + gap, dtype=dtype, requires_grad=True)
    loss = npo_loss(nll, torch.tensor(1e6, dtype=dtype), 0.1)
    loss.backward()
    # Forgotten: no loss and no pull. Remembered: twice the gap, and a pull of twice that of ascent.
    assert loss.item() == pytest.approx(2 * max(-gap, 0))
    assert nll.grad.item() == (-2 if gap < 0 else 0)


@examples(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(2, 9), st.integers(0, 8)), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.sampled_from([None, 8]),
    st.integers(0, 10**6),
)
def test_sums_over_masks_and_lengths_are_those_of_a_loop_over_tokens(tokenizer, texts, side, multiple, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (torch.randint(5, 17, (length,), generator=generator).tolist(), min(first, length - 1))
        for length, first in texts
    ]
    tokenizer.padding_side = side
    try:
        batch = ElmDataCollator(tokenizer, pad_to_multiple_of=multiple).pad(rows)
    finally:
        tokenizer.padding_side = "right"
    scores = 4 * torch.randn(*batch["input_ids"].shape, 17, generator=generator)  # [batch, seq, vocab]

    made = sequence_nll(nll_reading(batch)(scores[batch["rows"], batch["columns"]], slice(None)), batch)

    for index, (ids, first) in enumerate(rows):
        start = scores.size(1) - len(ids) if side == "left" else 0
        expected = 0.0
        for place in range(max(first, 1), len(ids)):
            row = scores[index, start + place - 1].tolist()
            expected += math.log(sum(math.exp(value) for value in row)) - row[ids[place]]
        assert made[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("stored", [True, False])
def test_at_the_start_the_gradient_is_that_of_ascent_on_summed_log_likelihoods(stored, make):
    trainer = make(retain_weight=0.0, precompute_ref_log_probs=stored, beta=0.1)
    trainer.model.double()

    loss = trainer.compute_loss(trainer.model, batch_of(trainer, ROWS))

    assert loss.item() == pytest.approx(20 * math.log(2), rel=1e-5)
    ascent = -torch.stack([nll.sum() for nll in column_nlls(trainer, "forget_ids", ROWS)]).mean()
    assert_same_gradients(gradients(trainer, loss), gradients(trainer, ascent))


@pytest.mark.parametrize("stored", [True, False])
def test_away_from_the_reference_loss_and_gradient_are_those_of_texts_taken_one_by_one(stored, make):
    trainer = make(precompute_ref_log_probs=stored, beta=0.5, erase_weight=0.7, retain_weight=1.3)
    trainer.model.double()
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=3)

    loss = trainer.compute_loss(trainer.model, batch_of(trainer, ROWS))

    with torch.no_grad(), trainer.model.disable_adapter():
        reference = [nll.sum() for nll in column_nlls(trainer, "forget_ids", ROWS)]
    own = [nll.sum() for nll in column_nlls(trainer, "forget_ids", ROWS)]
    erase = [2 / 0.5 * torch.log1p(torch.exp(0.5 * (r - o))) for o, r in zip(own, reference, strict=True)]
    retain = [nll.mean() for nll in column_nlls(trainer, "retain_ids", ROWS)]
    expected = 0.7 * torch.stack(erase).mean() + 1.3 * torch.stack(retain).mean()
    assert max(abs((o - r).item()) for o, r in zip(own, reference, strict=True)) > 0.1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(trainer, loss), gradients(trainer, expected))


def test_stored_reference_gives_the_losses_of_one_run_in_every_step(make, tokenizer, dataset, tmp_path):
    losses = []
    for stored in (True, False):
        args = dict(precompute_ref_log_probs=stored, eval_strategy="steps", eval_steps=1, output_dir=str(tmp_path))
        trainer = make(tiny("llama", len(tokenizer)), dataset.select([3, 1, 2]), max_steps=4, **args)
        trainer.train()
        losses.append([entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history[:-1]])
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("stored", "forwards"), [(True, 1), (False, 2)])
def test_a_stored_reference_spares_the_step_a_forward(stored, forwards, make, tiny_model):
    trainer = make(precompute_ref_log_probs=stored, max_steps=1)
    trainer.packed.final_logits(trainer.model)  # measured once for all steps
    trainer.packed.texts_interact(trainer.model)
    calls = []
    tiny_model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == forwards


def test_training_makes_forget_text_less_likely_than_the_reference_finds_it(make):
    trainer = make(max_steps=4, retain_weight=0.0)
    before = [nll.sum().item() for nll in column_nlls(trainer, "forget_ids", ROWS)]
    trainer.train()
    after = [nll.sum().item() for nll in column_nlls(trainer, "forget_ids", ROWS)]
    assert all(late > early + 0.5 for early, late in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "`beta` is 0.0: it must be above 0"),
        ({"retain_loss": "mse"}, "`retain_loss` is 'mse': use one of nll, kl"),
        ({"erase_weight": 0.0, "retain_weight": 0.0}, "All of `erase_weight`, `retain_weight` are 0: raise one"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        NpoConfig("unused", bf16=False, **fields)
