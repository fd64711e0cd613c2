import pytest
import torch

from elm_trainer import ModelPair
from elm_trainer.evaluation.measures import retention


TEXTS = [
    "Bread needs flour, water and some salt.",
    "The cat sat on the mat.",
    "A short one",
    "On Sundays the market opens late, and the fish is gone by noon, as everybody in the village knows.",
]


def slow_retention(model, tokenizer, text, max_length):
    """One text, full logits in float64, one position after another."""
    ids = tokenizer(text)["input_ids"][:max_length]
    with torch.no_grad():
        adapted = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        with model.disable_adapter():
            reference = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    reference_nll = adapted_nll = kl = 0.0
    for position, token in enumerate(ids[1:]):
        reference_nll -= reference[position, token].item()
        adapted_nll -= adapted[position, token].item()
        kl += (reference[position].exp() * (reference[position] - adapted[position])).sum().item()
    return reference_nll, adapted_nll, kl, len(ids) - 1


@pytest.mark.parametrize("max_length", [6, 64])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_sums_agree_with_full_logits_text_by_text(adapted_model, tokenizer, batch_size, max_length):
    kept = retention(ModelPair(adapted_model), tokenizer, TEXTS, batch_size=batch_size, max_length=max_length)

    expected = [slow_retention(adapted_model, tokenizer, text, max_length) for text in TEXTS]
    reference_nll, adapted_nll, kl, tokens = (list(column) for column in zip(*expected, strict=True))
    assert kept.tokens == tokens
    assert kept.reference_nll == pytest.approx(reference_nll, rel=1e-4)
    assert kept.adapted_nll == pytest.approx(adapted_nll, rel=1e-4)
    assert kept.kl == pytest.approx(kl, rel=1e-3, abs=1e-4)
    assert min(kept.kl) > 0.01


def test_an_untouched_adapter_keeps_everything(tiny_peft_model, tokenizer):
    kept = retention(ModelPair(tiny_peft_model), tokenizer, TEXTS)

    assert kept.adapted_nll == kept.reference_nll
    assert kept.kl == [0.0] * len(TEXTS)


def test_the_padding_side_changes_nothing(adapted_model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", "right")
    right = retention(ModelPair(adapted_model), tokenizer, TEXTS)
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    left = retention(ModelPair(adapted_model), tokenizer, TEXTS)

    assert left.tokens == right.tokens
    assert left.adapted_nll == pytest.approx(right.adapted_nll, rel=1e-4)
    assert left.kl == pytest.approx(right.kl, rel=1e-3, abs=1e-4)


def test_the_model_is_handed_back_in_training_mode_with_its_adapter_on(adapted_model, tokenizer):
    adapted_model.train()
    retention(ModelPair(adapted_model), tokenizer, TEXTS[:1])

    assert adapted_model.training
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        adapted = adapted_model(ids).logits
        with adapted_model.disable_adapter():
            assert not torch.allclose(adapted, adapted_model(ids).logits)
