import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from elm_trainer.methods.likelihood import SimNpoConfig, SimNpoTrainer, npo_loss, simnpo_loss

from .by_hand import assert_same_gradients, batch_of, column_nlls, gradients


ROWS = range(3)


@pytest.fixture
def make(tiny_model, tokenizer, dataset, settings, lora):
    def make(**fields):
        return SimNpoTrainer(
            tiny_model, settings(SimNpoConfig, **fields), train_dataset=dataset, processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("beta", [0.1, 4.5, 30.0])
@pytest.mark.parametrize("delta", [0.0, 2.0])
def test_at_the_margin_the_loss_is_two_log_two_over_beta_and_its_gradient_minus_one(beta, delta):
    nll = torch.tensor(delta, dtype=torch.float64, requires_grad=True)
    loss = simnpo_loss(nll, beta, delta)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2) / beta, abs=1e-6)
    assert nll.grad.item() == pytest.approx(-1, abs=1e-6)


@examples(deadline=None)
@given(st.floats(0, 20), st.floats(0, 5), st.floats(0.05, 10), st.integers(1, 60))
def test_it_is_npo_of_a_reference_with_the_margin_per_token_and_beta_over_the_length(nll, delta, beta, length):
    nll, reference = (torch.tensor(value, dtype=torch.float64) for value in (nll, length * delta))
    npo = npo_loss(length * nll, reference, beta / length) / length
    assert simnpo_loss(nll, beta, delta).item() == pytest.approx(npo.item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("nll", [0.0, 1.0, 4.6])
def test_the_pull_fades_as_the_config_says(nll):
    value = torch.tensor(nll, dtype=torch.float64, requires_grad=True)
    simnpo_loss(value, 4.5, 0.0).backward()
    assert value.grad.item() == pytest.approx(-2 / (1 + math.exp(4.5 * nll)), abs=1e-9)


@pytest.mark.parametrize("beta", [4.5, 1e4])
def test_extremes_neither_overflow_nor_lose_their_gradient(beta):
    nll = torch.tensor([0.0, 1e5], requires_grad=True)
    loss = simnpo_loss(nll, beta, 1e4)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([2e4, 0.0])
    assert nll.grad.tolist() == [-2, 0]


def test_loss_and_gradient_are_those_of_texts_taken_one_by_one(make):
    trainer = make(beta=0.8, delta=10.5, erase_weight=0.7, retain_weight=1.3)
    trainer.model.double()

    loss = trainer.compute_loss(trainer.model, batch_of(trainer, ROWS))

    own, retain = (
        torch.stack([nll.mean() for nll in column_nlls(trainer, column, ROWS)])
        for column in ("forget_ids", "retain_ids")
    )
    expected = 0.7 * (2 / 0.8 * torch.log1p(torch.exp(-0.8 * (own - 10.5)))).mean() + 1.3 * retain.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(trainer, loss), gradients(trainer, expected))


def test_no_reference_is_run(make, tiny_model):
    trainer = make(max_steps=1)
    trainer.packed.final_logits(trainer.model)  # measured once for all steps
    trainer.packed.texts_interact(trainer.model)
    calls = []
    tiny_model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 1


def test_training_makes_forget_text_less_likely(make):
    trainer = make(max_steps=4, delta=12.0, erase_weight=1.0, retain_weight=0.0)
    before = [nll.mean().item() for nll in column_nlls(trainer, "forget_ids", ROWS)]
    trainer.train()
    after = [nll.mean().item() for nll in column_nlls(trainer, "forget_ids", ROWS)]
    assert all(late > early + 0.1 for early, late in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": -1.0}, "`beta` is -1.0: it must be above 0"),
        ({"delta": -0.5}, "`delta` is -0.5: it must be at least 0"),
        ({"retain_loss": "argmax"}, "`retain_loss` is 'argmax': use one of nll, kl"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        SimNpoConfig("unused", bf16=False, **fields)
