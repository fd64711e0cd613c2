import pytest
import yaml

from elm_trainer import load_bank, read_questions
from elm_trainer.data.questions import BANKS, Question, check_questions


GOOD = {"question": "Which river flows through Rome?", "answer": "Tiber", "distractors": ["Po", "Arno"]}


@pytest.mark.parametrize("name", BANKS)
def test_the_built_in_banks_are_sound(name):
    check_questions(name, load_bank(name))


def test_a_bank_of_ones_own_is_read_from_yaml_and_json_lines(tmp_path):
    (tmp_path / "bank.yaml").write_text(yaml.safe_dump({"questions": [GOOD | {"aliases": ["Tevere"]}]}))
    (tmp_path / "bank.jsonl").write_text('{"question": "Which river flows through Rome?", "answer": "Tiber", '
                                         '"distractors": ["Po", "Arno"], "aliases": ["Tevere"]}\n')  # fmt: skip
    [question] = read_questions(tmp_path / "bank.yaml")
    assert set(question.options) == {"Tiber", "Po", "Arno"} and question.aliases == ("Tevere",)
    assert read_questions(tmp_path / "bank.jsonl") == [question]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Where?", "distractors": ["Po"]}, r"question 1 lacks \['answer'\]"),
        (GOOD | {"distractors": []}, r"question 1 lacks \['distractors'\]"),
        (GOOD | {"distractors": ["Po", "Po"]}, "`options` holds duplicates"),
        (GOOD | {"distractors": ["Tiber"]}, "`options` holds duplicates"),
        (GOOD | {"question": "Is the Tiber in Rome?"}, "the question names its answer 'Tiber': reword it"),
    ],
)
def test_a_bank_that_can_measure_nothing_is_refused(record, message, tmp_path):
    path = tmp_path / "bank.yaml"
    path.write_text(yaml.safe_dump({"questions": [record]}))
    with pytest.raises(ValueError, match=message):
        read_questions(path)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "holds no questions after filtering"),
        ([Question("Where?", ("a", "b"), "c")], "the answer 'c' is none of the options"),
        ([Question("Where?", ("a",), "a")], "there is only the option"),
    ],
)
def test_questions_without_a_choice_are_refused(questions, message):
    with pytest.raises(ValueError, match=message):
        check_questions("mine", questions)


@pytest.mark.parametrize("text", ["questions: [", "- a", "questions:\n  - {"])
def test_a_malformed_bank_is_named(text, tmp_path):
    path = tmp_path / "bank.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="bank.yaml cannot be parsed"):
        read_questions(path)


def test_a_missing_bank_is_named(tmp_path):
    with pytest.raises(OSError, match="none.yaml cannot be read"):
        read_questions(tmp_path / "none.yaml")
