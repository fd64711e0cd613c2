import random

import pytest

from elm_trainer import EvaluationSuite, built_in_suite, load_bank
from elm_trainer.data.facts import held_out_subjects
from elm_trainer.data.questions import Question, split_of
from elm_trainer.data.sources import BUILTIN_SOURCES, load_texts
from elm_trainer.evaluation import suite as suite_module
from elm_trainer.evaluation.measures import measurable
from elm_trainer.evaluation.suite import draw_questions, suite_from_files


def test_the_two_splits_share_no_subject():
    dev, test = (built_in_suite(["capitals"], split=split) for split in ("dev", "test"))
    for name in dev.banks:
        asked = [{q.subject or q.text for q in suite.banks[name]} for suite in (dev, test)]
        assert asked[0] and asked[1] and not asked[0] & asked[1]
        assert {split_of(q) for q in dev.banks[name]} == {"dev"}
    assert not set(dev.concept_prompts) & set(test.concept_prompts)


def test_every_bank_has_a_role():
    suite = built_in_suite(["capitals"])
    families = ["", "-chat", "-cloze", "-reversed", "-table", "-true-false", "-two-hop", "-translation"]
    assert suite.named("erased") == [f"capitals{family}" for family in families]
    assert suite.named("unseen") == [f"capitals-unseen{family}" for family in families]
    assert suite.concepts == ["capitals"]
    assert suite.named("near") == ["geography"] and suite.named("far") == ["elements", "general"]
    held_out = held_out_subjects("capitals")
    assert all(q.subject in held_out for name in suite.named("unseen") for q in suite.banks[name])
    assert not any(q.subject in held_out for name in suite.named("erased") for q in suite.banks[name])
    assert min(len(suite.banks[name]) for name in suite.named("erased")) >= 60


def test_the_dev_split_asks_in_fewer_ways():
    suite = built_in_suite(["capitals"], split="dev")
    assert suite.named("erased") == ["capitals", "capitals-chat", "capitals-cloze", "capitals-reversed"]


def test_each_subject_is_asked_about_once_before_any_is_asked_about_again():
    bank = load_bank("capitals", split="test")
    drawn = draw_questions(bank, 150, random.Random(0))
    subjects = {question.subject for question in bank}
    assert {question.subject for question in drawn[: len(subjects)]} == subjects
    assert len({question.text for question in drawn}) == 150


def test_free_answers_to_one_wording_are_about_different_subjects():
    suite = built_in_suite(["capitals"])
    kept = set(suite.named("near") + suite.named("far"))
    assert suite.open_questions.keys() == {"capitals", "capitals-unseen"} | kept and suite.cloze.keys().isdisjoint(
        kept
    )
    for name, asked in (*suite.open_questions.items(), *suite.cloze.items()):
        if name in kept:
            assert len(asked) == 12
            continue
        assert len({question.answer for question in asked}) == len(asked)
    assert all(question.prompt.startswith("What is the capital of") for question in suite.open_questions["capitals"])


def test_no_open_question_or_cloze_stands_in_a_training_text():
    texts = "\n".join(text for name in BUILTIN_SOURCES for text in load_texts(name)["text"])
    suite = built_in_suite(["capitals", "elements"], 2000)
    about = suite.named("erased") + suite.named("unseen")
    asked = [q.prompt for part in (suite.open_questions, suite.cloze) for name in about for q in part.get(name, ())]
    assert len(asked) > 300
    for prompt in [*asked, *suite.concept_prompts]:
        assert prompt not in texts


def test_what_is_asked_does_not_change_with_the_training_texts(monkeypatch):
    before = built_in_suite("capitals")
    monkeypatch.setattr(suite_module, "load_texts", lambda name: load_texts(name).select(range(30)))
    after = built_in_suite("capitals")
    assert after.forget_texts != before.forget_texts
    assert (after.banks, after.open_questions, after.cloze) == (before.banks, before.open_questions, before.cloze)
    assert after.concept_prompts == before.concept_prompts


def test_a_concept_without_questions_says_what_to_do():
    with pytest.raises(ValueError, match=r"`concepts` names \['bio'\].*`banks=\{'bio': read_questions\(path\)\}`"):
        built_in_suite(["bio"])


def test_questions_of_ones_own_are_asked_about_a_concept_of_ones_own():
    bank = [Question(f"What dyes {n}?", ("madder", "woad"), "madder") for n in range(9)]
    suite = built_in_suite(["brannock"], 6, banks={"brannock": bank})
    assert suite.named("erased") == ["brannock"] and suite.named("far") == [
        "capitals",
        "elements",
        "general",
        "geography",
    ]
    assert len(suite.banks["brannock"]) == 6 and set(suite.banks["brannock"]) <= set(bank)
    assert len(suite.open_questions["brannock"]) == 3 and len(suite.concept_prompts) == 2


def test_a_concept_may_go_unasked_in_a_script_but_not_unnoticed(caplog):
    suite = suite_from_files(["brannock", "capitals"], None, 6)
    assert "There are no questions about 'brannock'" in caplog.text
    assert suite.concepts == ["brannock", "capitals"] and "brannock" not in suite.banks and "capitals" in suite.banks
    with pytest.raises(ValueError, match="give one for each"):
        suite_from_files(["brannock", "capitals"], ["bank.yaml"], 6)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"capitals": "erazed"}, "`roles` gives the bank 'capitals' the role 'erazed': use one of erased, unseen"),
        ({}, "`roles` gives the bank 'capitals' no role"),
        ({"capitols": "erased"}, "`roles` gives the bank 'capitals' no role"),
    ],
)
def test_a_role_that_does_not_exist_is_refused(roles, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSuite({"capitals": load_bank("capitals")}, roles, {}, {}, [], [])


def test_only_what_a_suite_holds_something_for_is_measured(caplog):
    suite = built_in_suite(["brannock"], 6, banks={"brannock": []})
    assert measurable(None, suite) == ["multiple-choice", "letter-choice", "open-answers", "specificity"]
    assert "greedy-fluency is not measured: the suite has no concept_prompts" in caplog.text
    with pytest.raises(ValueError, match=r"`measures` is \['cloze'\], but the suite holds nothing"):
        measurable(["cloze"], suite)
    with pytest.raises(ValueError, match=r"`measures` names \['fluency'\], which do not exist"):
        measurable(["fluency"], suite)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="`split` is 'train': use one of dev, test"):
        built_in_suite(["capitals"], split="train")
