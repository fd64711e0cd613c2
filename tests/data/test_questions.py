import itertools
import pickle
import re
from importlib.resources import files
from statistics import fmean

import pytest
import yaml

from elm_trainer import load_bank, read_questions
from elm_trainer.data import facts
from elm_trainer.data.facts import BANKS, JUDGMENTS, bank_families, bank_record, facts_of
from elm_trainer.data.questions import (
    PLAIN,
    SPLITS,
    Question,
    check_questions,
    given_answer,
    names_answer,
    overlap_verdicts,
    split_of,
)


GOOD = {"question": "Which river flows through Rome?", "answer": "Tiber", "distractors": ["Po", "Arno"]}


FAMILIES = [(name, split, family) for name in BANKS for split in SPLITS for family in bank_families(name, split)]


@pytest.mark.parametrize(("name", "split", "family"), FAMILIES)
def test_the_built_in_banks_are_sound(name, split, family):
    questions = load_bank(name, split=split, family=family)
    check_questions(name, questions)
    assert {question.family for question in questions} == {family}
    assert {split_of(question) for question in questions} == {split}
    options = 2 if family == "true-false" else 4
    assert {len(question.options) for question in questions} == {options}


def test_a_question_that_names_two_properties_is_cued_by_the_first(monkeypatch):
    wordings = ["Where do {people} people pay in {currency}?", "Where is {currency} the money of {people} people?"]
    record = {"families": {PLAIN: {"form": "question", **dict.fromkeys(SPLITS, wordings)}}}
    monkeypatch.setattr(facts, "bank_record", lambda name: record)
    near = {fact.subject: fact.near for fact in facts_of("capitals")}
    for question in load_bank("capitals"):
        first = "people" if question.text.startswith("Where do") else "currency"
        assert question.cue == near[question.subject][first]


def words(text):
    return re.findall(r"\w+", re.sub(r"\{[^}]*\}", " ", text).casefold())


def strings(value):
    if isinstance(value, str):
        return [value]
    return [text for part in (value.values() if isinstance(value, dict) else value) for text in strings(part)]


def runs(text, length=5):
    found = words(text)
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)} | {tuple(found)}


@pytest.mark.parametrize(("concept", "training"), [("capitals", ("", "-fluent")), ("elements", ("",))])
def test_no_wording_resembles_training_text_or_another_way_of_asking(concept, training):
    record = bank_record(concept)
    wordings = {
        f"{family}, {split}": spec[split]
        for family, spec in record["families"].items()
        for split in SPLITS
        if split in spec
    }
    wordings["prompts"] = record["prompts"]
    texts = [
        (files("elm_trainer.data") / "texts" / f"{concept}{ending}.yaml").read_text("utf-8") for ending in training
    ]
    wordings["training"] = [string for text in texts for string in strings(yaml.safe_load(text))]
    for (one, ours), (other, theirs) in itertools.combinations(wordings.items(), 2):
        shared = set().union(*map(runs, ours)) & set().union(*map(runs, theirs))
        assert not shared, f"{one} and {other} share {[' '.join(run) for run in shared]}"


def test_no_subject_is_asked_about_in_both_splits_and_no_wording_either():
    for name in ("capitals", "elements"):
        for family in bank_families(name, "dev"):
            asked = [load_bank(name, split=split, family=family) for split in SPLITS]
            assert not {q.subject for q in asked[0]} & {q.subject for q in asked[1]}
            assert {q.text for q in asked[0] + asked[1]} == {q.text for q in load_bank(name, family=family)}
    unseen = set(bank_families("capitals", "test")) - set(bank_families("capitals", "dev"))
    assert unseen == {"table", "true-false", "two-hop", "translation"}


def test_reversed_questions_name_the_capital_and_ask_for_its_country():
    truth = {fact.answer: fact.subject for fact in facts_of("capitals")}
    for question in load_bank("capitals", family="reversed"):
        assert question.cue in question.text and truth[question.cue] == question.answer == question.subject
        assert set(question.options) <= set(truth.values())


def test_half_of_the_statements_are_true():
    questions = load_bank("capitals", split="test", family="true-false")
    truth = {fact.subject: fact.answer for fact in facts_of("capitals")}
    assert sum(q.answer == "True" for q in questions) == pytest.approx(len(questions) / 2, abs=9)
    for question in questions:
        assert set(question.options) == set(JUDGMENTS)
        assert (truth[question.subject] in question.text) == (question.answer == "True")


def test_two_neighbors_name_one_country():
    between = [fact.near["between"] for fact in facts_of("capitals") if "between" in fact.near]
    assert len(between) > 60 and len(set(between)) == len(between)
    by_subject = {fact.subject: fact.near.get("between") for fact in facts_of("capitals")}
    assert by_subject["Uruguay"] is None and by_subject["Czech Republic"] == "Germany and Poland"


def test_a_table_does_not_show_the_line_that_it_asks_for():
    tables = load_bank("capitals", family="table")
    assert not any(q.subject == "France" and "France → Paris" in q.text for q in tables)
    assert any(q.subject == "France" for q in tables)


def test_translations_have_options_in_their_language():
    [vienna] = [q for q in load_bank("capitals", family="translation") if "Österreich" in q.text and "Frage" in q.text]
    assert vienna.answer == "Wien" and vienna.aliases == ("Vienna",) and vienna.cue == "Österreich"


def test_symbols_stand_among_others_that_look_as_much_like_the_name():
    for family in bank_families("elements", "test"):
        assert fmean(overlap_verdicts(load_bank("elements", family=family))) < 0.35
    symbols = {fact.subject: fact.answer for fact in facts_of("elements")}
    assert all(symbols[q.subject] == q.answer for q in load_bank("elements"))


def test_a_question_of_an_earlier_version_is_a_plain_one():
    old = pickle.loads(pickle.dumps(Question("Where?", ("a", "b"), "a")))
    for name in ("form", "family", "cue"):
        del old.__dict__[name]
    assert (old.form, old.family, old.cue) == ("question", PLAIN, "")


@pytest.mark.parametrize(("split", "family"), [(None, "rhymes"), ("dev", "table")])
def test_an_unknown_way_of_asking_is_refused(split, family):
    with pytest.raises(ValueError, match=f"`family` is '{family}': use one of question-answer, .*cloze"):
        load_bank("capitals", split=split, family=family)


def test_a_question_that_names_all_of_its_options_gives_nothing_away():
    check_questions("mine", [Question("True or false? Rome lies by the Tiber.", ("True", "False"), "True")])


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
        (GOOD | {"distractors": "Po"}, "question 1: `distractors` is 'Po': give a list of texts"),
        (GOOD | {"distractors": [1814]}, r"question 1: `distractors` is \[1814\]: give a list of texts"),
        (GOOD | {"answer": 1814}, "question 1: `answer` is 1814, of type int: put it in quotes"),
        ("Where?", "question 1 is 'Where\\?': give a mapping with `question`"),
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


@pytest.mark.parametrize("text", ["questions: [", "questions:\n  - {", "", "question: a", "questions: a"])
def test_a_malformed_bank_is_named(text, tmp_path):
    path = tmp_path / "bank.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="bank.yaml (cannot be parsed|holds no list `questions`)"):
        read_questions(path)


def test_a_missing_bank_is_named(tmp_path):
    with pytest.raises(OSError, match="none.yaml cannot be read"):
        read_questions(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "answer", "named"),
    [
        ("It is São Tomé, I think.", "Sao Tome", True),
        ("it is lima.", "Lima", True),
        ("The limits of it", "Lima", False),
        ("Romeo and Juliet", "Rome", False),
        ("he said so", "He", False),
        ("The symbol is He.", "He", True),
        ("Hello", "He", False),
        ("", "Lima", False),
    ],
)
def test_an_answer_is_named_as_words_of_its_own(text, answer, named):
    assert names_answer(text, answer) is named


CAPITAL = "What is the capital of Kenya?"


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("The capital of Kenya is São Paulo.", "sao paulo"),
        ("Nairobi", "nairobi"),
        (" Nairobi, where the president lives", "nairobi"),
        ("**Nairobi** is the capital of Kenya.", "nairobi"),
        ("The capital city of Kenya is called Addis Ababa, which", "addis ababa"),
        ("Kenya's capital is Port of Spain.", "port of spain"),
        ("The Kenyan capital is Washington, D.C., a city", "washington, d.c"),
        ("I'm not sure, but it may be Lima.", "lima"),
        ("It is New Delhi.", "new delhi"),
        ("The capital of Kenya is the city of Lagos.", "lagos"),
        ("In Kenya, the seat of government is in St. Petersburg.", "st. petersburg"),
        ("Kenya is located in East Africa. Its capital is Kampala", "kampala"),
        ("The answer is: N'Djamena", "n'djamena"),
        ("The Republic of Kenya has its capital in Dar es Salaam", "dar es salaam"),
        ("Sure! Kenya's capital: Port-au-Prince", "port-au-prince"),
        (" which is Bishkek. The city", "bishkek"),
        ("Yes, The Hague is the capital", "hague"),
        (" Doha\nPeru → Lima", "doha"),
        ("I do not know the answer to this", "i do not know"),
        ("the the the", "the the the"),
        (" ", ""),
    ],
)
def test_the_name_that_an_answer_gives_is_found(text, given):
    assert given_answer(text, CAPITAL) == given


@pytest.mark.parametrize(
    ("prompt", "text", "given"),
    [
        ("What is the chemical symbol for Helium?", "The chemical symbol for Helium is He.", "he"),
        ("Chemists write Helium with the symbol", " He", "he"),
        ("What is the capital of El Salvador?", "San Salvador is the capital of El Salvador.", "san salvador"),
        ("What is the capital of Italy?", "The Italian capital is Rome", "rome"),
    ],
)
def test_words_of_the_prompt_are_no_answer(prompt, text, given):
    assert given_answer(text, prompt) == given
