import math

import pytest

from elm_trainer import ModelPair
from elm_trainer.evaluation import measures
from elm_trainer.evaluation.fluency import Generations
from elm_trainer.evaluation.measures import MEASURES, Setting
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
