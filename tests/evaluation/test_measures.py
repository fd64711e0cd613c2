import pytest

from elm_trainer import ModelPair
from elm_trainer.evaluation.measures import MEASURES, Setting


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
