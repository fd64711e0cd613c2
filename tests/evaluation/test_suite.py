import pytest

from elm_trainer import built_in_suite
from elm_trainer.data.questions import held_out_subjects, split_of
from elm_trainer.data.sources import BUILTIN_SOURCES, load_texts


def test_the_two_splits_share_no_subject():
    dev, test = (built_in_suite(["capitals"], split=split) for split in ("dev", "test"))
    for name in dev.banks:
        asked = [{q.subject or q.text for q in suite.banks[name]} for suite in (dev, test)]
        assert asked[0] and asked[1] and not asked[0] & asked[1]
        assert {split_of(q) for q in dev.banks[name]} == {"dev"}
    assert not set(dev.concept_prompts) & set(test.concept_prompts)


def test_every_bank_has_a_role():
    suite = built_in_suite(["capitals"])
    assert suite.named("erased") == ["capitals"] and suite.named("unseen") == ["capitals-unseen"]
    assert suite.named("near") == ["geography"] and suite.named("far") == ["elements", "general"]
    held_out = held_out_subjects("capitals")
    assert all(q.subject in held_out for q in suite.banks["capitals-unseen"])
    assert not any(q.subject in held_out for q in suite.banks["capitals"])


def test_no_open_question_or_cloze_stands_in_a_training_text():
    texts = "\n".join(text for name in BUILTIN_SOURCES for text in load_texts(name)["text"])
    suite = built_in_suite(["capitals", "elements"], 2000)
    asked = [q.prompt for part in (suite.open_questions, suite.cloze) for bank in part.values() for q in bank]
    assert len(asked) > 500
    for prompt in [*asked, *suite.concept_prompts]:
        assert prompt not in texts


def test_a_concept_without_facts_is_refused():
    with pytest.raises(ValueError, match="No built-in facts named 'bio'"):
        built_in_suite(["bio"])


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="`split` is 'train': use one of dev, test"):
        built_in_suite(["capitals"], split="train")
