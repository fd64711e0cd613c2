from dataclasses import replace

import pytest

from elm_trainer import load_bank
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.evaluate import find_shortcuts
from elm_trainer.evaluation.statistics import Items


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
