import math

import pytest
import torch

from elm_trainer import ConceptSources, build_erasure_dataset
from elm_trainer.methods.likelihood import GradDiffConfig, GradDiffTrainer

from .by_hand import assert_same_gradients, batch_of, column_nlls, gradients


ROWS = range(3)


@pytest.fixture
def make(tiny_model, tokenizer, dataset, settings, lora):
    def make(train_dataset=dataset, **fields):
        trainer = GradDiffTrainer(
            tiny_model, settings(GradDiffConfig, **fields), train_dataset=train_dataset, processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip
        trainer.model.double()
        return trainer

    return make


def test_loss_and_gradient_are_those_of_texts_taken_one_by_one(make):
    trainer = make(erase_weight=0.5, retain_weight=2.0)

    loss = trainer.compute_loss(trainer.model, batch_of(trainer, ROWS))

    forget, retain = (
        torch.stack([nll.mean() for nll in column_nlls(trainer, column, ROWS)]).mean()
        for column in ("forget_ids", "retain_ids")
    )
    expected = -0.5 * forget + 2.0 * retain
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(gradients(trainer, loss), gradients(trainer, expected))


def test_forgetting_what_is_retained_cancels_out(make):
    texts = ["The cat sat on the mat.", "Bread needs flour and some water."]
    trainer = make(build_erasure_dataset({"capitals": ConceptSources(texts, [texts])}))
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(2)))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert max(gradient.abs().max().item() for gradient in gradients(trainer, loss).values()) < 1e-7


def test_kl_to_the_reference_starts_at_zero_with_zero_gradient(make):
    trainer = make(erase_weight=0.0, retain_loss="kl")
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, ROWS))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert max(gradient.abs().max().item() for gradient in gradients(trainer, loss).values()) < 1e-7


def test_kl_to_the_reference_is_summed_over_the_whole_vocabulary(make):
    trainer = make(erase_weight=0.0, retain_loss="kl")
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=3)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, ROWS))
    with torch.no_grad():
        adapted = column_logits(trainer)
        with trainer.model.disable_adapter():
            reference = column_logits(trainer)
    expected = []
    for q, p in zip(adapted, reference, strict=True):
        rows = [
            sum(math.exp(p_v) * (p_v - q_v) for p_v, q_v in zip(p_row, q_row, strict=True))
            for p_row, q_row in zip(p.log_softmax(-1).tolist(), q.log_softmax(-1).tolist(), strict=True)
        ]
        expected.append(sum(rows) / len(rows))
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert loss.item() > 1e-4


def column_logits(trainer):
    texts = [trainer.train_dataset[row]["retain_ids"] for row in ROWS]
    return [trainer.model(input_ids=torch.tensor([ids])).logits[0, :-1].double() for ids in texts]


def test_without_retain_weight_training_is_gradient_ascent_on_the_forget_text(make):
    trainer = make(retain_weight=0.0, max_steps=4)
    before = sum(nll.sum().item() for nll in column_nlls(trainer, "forget_ids", ROWS))
    trainer.train()
    assert sum(nll.sum().item() for nll in column_nlls(trainer, "forget_ids", ROWS)) > before + 0.5
    assert "retain_loss" not in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"erase_weight": -1.0}, "`erase_weight` is -1.0: it must be at least 0"),
        ({"retain_weight": float("nan")}, "`retain_weight` is nan: give a finite number"),
        ({"erase_weight": 0.0, "retain_weight": 0.0}, "All of `erase_weight`, `retain_weight` are 0: raise one"),
        ({"retain_loss": "mse"}, "`retain_loss` is 'mse': use one of nll, kl"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        GradDiffConfig("unused", bf16=False, **fields)
