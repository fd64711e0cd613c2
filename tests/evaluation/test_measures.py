import math
from dataclasses import replace

import pytest
import torch

from elm_trainer import ModelPair, load_bank
from elm_trainer.data.questions import Question
from elm_trainer.evaluation import measures
from elm_trainer.evaluation.evaluate import find_shortcuts
from elm_trainer.evaluation.fluency import Generations
from elm_trainer.evaluation.measures import MEASURES, Setting, retention
from elm_trainer.evaluation.statistics import Items, against_chance, with_families
from elm_trainer.evaluation.suite import OpenQuestion


@pytest.fixture
def setting(adapted_model, tokenizer, suite):
    return Setting(ModelPair(adapted_model), tokenizer, suite, {}, temperature=0.7, batch_size=16, seed=0)


def test_both_sides_of_retain_text_take_one_forward_each(setting):
    calls = []
    setting.pair.erased.get_input_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))

    reference, erased = (MEASURES["specificity"](setting, side) for side in ("reference", "erased"))

    assert len(calls) == 2
    assert reference["retention.kl"].values == [0.0] * len(setting.suite.retain_texts)
    assert min(erased["retention.kl"].values) > 0
    assert reference["retention.perplexity"].values != erased["retention.perplexity"].values


def test_answers_stay_with_their_bank_though_all_are_asked_together(setting):
    asked = setting.suite.open_questions["capitals"]
    together = MEASURES["open-answers"](setting, "erased")["open_answers.capitals"]
    setting.suite.open_questions = {"first": asked[:1], "second": asked[1:]}

    apart = MEASURES["open-answers"](setting, "erased")

    assert apart["open_answers.first"].texts + apart["open_answers.second"].texts == together.texts
    assert len(set(together.texts)) > 1


def choices(right, n=60, chance=0.25):
    return Items("mean", [1.0] * right + [0.0] * (n - right), chances=[chance] * n, groups=[f"s{i}" for i in range(n)])


def test_what_is_left_is_told_only_where_the_reference_knows():
    known = against_chance(choices(45), choices(20))
    assert known["chance"] == 0.25 and known["left"]["value"] == pytest.approx((20 / 60 - 0.25) / 0.5)
    assert known["left"]["low"] < known["left"]["value"] < known["left"]["high"]
    assert against_chance(choices(20), choices(15))["left"] is None
    # A wide margin on few questions, whose interval reaches chance.
    assert against_chance(choices(3, n=6), choices(1, n=6))["left"] is None
    assert against_chance(Items("mean", [1.0]), Items("mean", [0.0])) == {}


def test_ways_of_asking_are_taken_together_where_the_reference_knows():
    before = {f"multiple_choice.{bank}.pmi": choices(right) for bank, right in (("a", 45), ("b", 16), ("c", 40))}
    after = {name: choices(15) for name in before}
    found = with_families(after, before, {"a": "erased", "b": "erased", "c": "unseen"})
    assert found.keys() - after.keys() == {"families.erased.pmi", "families.unseen.pmi"}
    assert found["families.erased.pmi"] == choices(15)


def test_an_answer_that_stands_for_every_subject_shows(setting, monkeypatch):
    said = ["It is São Paulo."] * 6 + ["It is Lima.", "It is Oslo.", "It is Bern.", "It is Lomé."]
    setting.suite.open_questions = {
        "capitals": [OpenQuestion(f"What is the capital of X{index}?", "Lima") for index in range(10)]
    }
    monkeypatch.setattr(measures, "generate_answers", lambda *_, **__: Generations(said, [False] * len(said)))

    found = MEASURES["open-answers"](setting, "erased")

    value = {name: items.estimate().value for name, items in found.items()}
    entropy = -0.6 * math.log(0.6) - 4 * 0.1 * math.log(0.1)
    assert value == {
        "open_answers.capitals": pytest.approx(0.1),
        "open_answers.capitals.commonest": pytest.approx(0.6),
        "open_answers.capitals.entropy": pytest.approx(entropy),
        "open_answers.capitals.evenness": pytest.approx(entropy / math.log(10)),
    }


def test_all_banks_are_ranked_together_and_each_keeps_its_own(setting):
    together = MEASURES["multiple-choice"](setting, "erased")
    banks = setting.suite.banks
    for name in banks:
        setting.suite.banks = {name: banks[name]}
        apart = MEASURES["multiple-choice"](setting, "erased")
        assert apart == {key: items for key, items in together.items() if f".{name}." in key}


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


def test_options_that_show_in_the_name_are_flagged_and_the_built_in_concepts_are_not():
    banks = {name: load_bank(name) for name in ("capitals", "elements")}
    banks["shown"] = [replace(question, options=(question.answer, "X", "Y", "Q")) for question in banks["elements"]]
    guesses = {
        name: Items("mean", [float(index // 8 % 4 == 0) for index in range(len(bank))]) for name, bank in banks.items()
    }
    found = find_shortcuts(banks, guesses)
    assert found["shown"]["flagged"] and found["shown"]["letters"]["value"] > 0.5
    for name in ("capitals", "elements"):
        assert not found[name]["flagged"] and found[name]["chance"] == 0.25


def test_an_option_that_is_right_without_the_question_is_flagged():
    bank = [Question(f"What is number {i}?", (f"truth {i}", f"a {i}", f"b {i}"), f"truth {i}") for i in range(30)]
    [found] = find_shortcuts({"b": bank}, {"b": Items("mean", [1.0] * 30)}).values()
    assert found["flagged"] and found["question_removed"]["value"] == 1 and found["chance"] == pytest.approx(1 / 3)


def test_phrasings_of_one_fact_count_once():
    bank = load_bank("capitals")[:8]  # two countries, four phrasings each
    [found] = find_shortcuts({"b": bank}, {"b": Items("mean", [1.0] * 4 + [0.0] * 4)}).values()
    assert found["question_removed"]["n"] == 2 and found["question_removed"]["value"] == 0.5
