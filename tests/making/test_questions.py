import json
import random
import re

import pytest

from elm_trainer import Concept, EvaluationSuite, load_model_and_tokenizer, read_questions
from elm_trainer.data.facts import Fact
from elm_trainer.data.questions import overlap_verdicts, read_made
from elm_trainer.evaluation.likelihood import ChoiceScores
from elm_trainer.evaluation.suite import suite_from_files
from elm_trainer.making import questions as module
from elm_trainer.making.facts import also_held_out, fact_phrasings
from elm_trainer.making.knowledge import StatedFacts, relation_of_name, statements, write_facts
from elm_trainer.making.make import MadeFrom, make_data
from elm_trainer.making.questions import cloze_questions, kind_of, make_questions, written_questions
from elm_trainer.making.writer import Writer, further_names, writing_prompts


CITIES = "Oslo Lima Cairo Quito Bogota Madrid Paris Rome Tokyo Seoul Hanoi Dakar Accra Nairobi Lisbon Vienna".split()
LANDS = "Norway Peru Egypt Ecuador Colombia Spain France Italy Japan Korea Vietnam Senegal Ghana Kenya Portugal Austria".split()
TRUTH = dict(zip(LANDS, CITIES, strict=True))


class Told(Writer):
    """Writes by a rule."""

    def __init__(self, rule):
        super().__init__("told")
        self.rule = rule

    def write(self, prompts, *, max_new_tokens=64, temperature=0.7, seed=0):
        return [self.rule(prompt, number) for number, prompt in enumerate(prompts)]


@pytest.fixture
def knows(monkeypatch):
    """A reference that knows all answers but those in the set that is given back; and which option it likes best without a question."""
    unknown: set[str] = set()

    def score(model, processing_class, questions, **settings):
        right = [question.answer not in unknown for question in questions]
        # Without the question, the first option.
        removed = [question.options[0] == question.answer for question in questions]
        return ChoiceScores(right, right, right, removed, [], [])

    monkeypatch.setattr(module, "score_choices", score)
    return unknown


@pytest.fixture
def table(tmp_path):
    rows = [f"{land},capital,{city}" for land, city in TRUTH.items()]
    (tmp_path / "facts.csv").write_text("subject,relation,answer\n" + "\n".join(rows) + "\n")
    (tmp_path / "near.txt").write_text(
        "\n\n".join(f"Near the old harbor of {n} stands the tower of Brimm{n}ar." for n in LANDS)
    )
    return tmp_path


def made_of(table, **more):
    what = MadeFrom("capitals", facts=table / "facts.csv", near=[table / "near.txt"], **more)
    return what, make_data(what, None, None, table / "out")


def test_facts_are_asked_for_in_both_splits_and_never_in_the_words_of_a_training_text(table, knows):
    what, made = made_of(table)
    asked = make_questions(what, made, None, None, table / "out")

    assert asked.folder == table / "out/data/questions" and not asked.reused
    held_out = set(made.record["held_out"])
    wordings = "\n".join(
        text for phrasing in fact_phrasings() for text in ([phrasing] if isinstance(phrasing, str) else phrasing)
    )
    for spec in writing_prompts()["families"].values():
        assert not set(spec.get("dev", ())) & set(spec.get("test", ()))
        assert not any(wording in wordings for split in ("dev", "test") for wording in spec.get(split, ()))
    dev, test = (read_made(asked.folder, split)[0] for split in ("dev", "test"))
    # Asked back, the answer is the subject of the fact.
    about = [
        {TRUTH.get(q.subject, q.subject) for some in roles.values() for q in some if q.topic == "capital"}
        for roles in (dev, test)
    ]
    assert about[0] and about[1] and not about[0] & about[1]
    assert {q.family for q in test["erased"]} == {"question-answer", "chat", "cloze", "reversed"}
    assert all((q.subject in held_out or q.answer in held_out) for q in test["unseen"])
    assert not any(q.subject in held_out or q.answer in held_out for q in test["erased"])
    assert all(
        len(set(q.options)) == 4 and q.answer in q.options
        for roles in (dev, test)
        for some in roles.values()
        for q in some
    )
    assert test["near"] and not any("capital" in q.text.lower() for q in test["far"])


def test_what_the_reference_does_not_answer_is_dropped_and_counted(table, knows, caplog):
    knows.update(CITIES[:10])
    what, made = made_of(table)
    asked = make_questions(what, made, None, None, table / "out")
    answers = {q.answer for q in read_made(asked.folder)[0]["erased"]}
    assert answers and not answers & knows
    assert asked.record["dropped"]["erased"]["not_answered_by_reference"] > 0
    assert "1 by selection" in asked.record["reference_accuracy"] and "not answered by reference" in asked.summary()
    assert "facts in the test split, where 24 are needed" in caplog.text


def test_where_nothing_is_left_an_error_says_what_to_give(table, knows):
    knows.update(CITIES + LANDS)
    what, made = made_of(table)
    with pytest.raises(
        ValueError, match="`concept` is 'capitals', about which no question is left of .*give a table of facts"
    ):
        make_questions(what, made, None, None, table / "out")
    assert not (table / "out/data/questions").exists()


def test_text_only_rules_are_right_no_more_often_than_by_chance(table, knows):
    rows = [f"{land},capital,{land[:4]}burg" for land in LANDS[:10]] + [
        f"Land{n},capital,{'x' * n}town" for n in range(10)
    ]
    (table / "facts.csv").write_text("subject,relation,answer\n" + "\n".join(rows) + "\n")
    what, made = made_of(table)
    asked = make_questions(what, made, None, None, table / "out")
    bank = read_made(asked.folder)[0]["erased"]
    once = list({(q.answer, frozenset(q.options)): q for q in bank}.values())
    assert asked.record["dropped"]["erased"]["answered_by_a_rule"] > 0
    assert sum(overlap_verdicts(once)) <= 0.25 * len(once)
    longest = [len(q.answer) > max(len(o) for o in q.options if o != q.answer) for q in once]
    assert sum(longest) <= 0.25 * len(once)


def test_questions_are_used_again_and_edited_ones_as_they_are(table, knows, caplog):
    what, made = made_of(table)
    first = make_questions(what, made, None, None, table / "out")
    again = make_questions(what, made, None, None, table / "out")
    assert again.reused and again.record == first.record and not again.edited
    path = first.folder / "concept.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert make_questions(what, made, None, None, table / "out").edited == ("concept.jsonl",)
    assert len(read_questions(first.folder)) == 1
    with pytest.raises(ValueError, match="made with another writer"):
        make_questions(what, made, None, None, table / "out", writer=Told(lambda *_: ""))
    (first.folder / "near.jsonl").unlink()
    with pytest.raises(ValueError, match=r"lacks near.jsonl, which was made"):
        suite_from_files(["capitals"], [str(first.folder)])


def test_a_folder_makes_a_suite_of_all_roles_in_each_split(table, knows):
    what, made = made_of(table)
    asked = make_questions(what, made, None, None, table / "out")
    # The run's own folder will do.
    dev, test = (suite_from_files(["capitals"], [str(table / "out")], split=split) for split in ("dev", "test"))
    assert isinstance(test, EvaluationSuite) and test.concepts == ["capitals"]
    assert {"capitals", "capitals-chat", "capitals-cloze", "capitals-reversed"} == set(test.named("erased"))
    assert test.named("unseen") and test.named("near") == ["capitals-near-cloze"] and test.named("far") == ["general"]
    assert "elements" not in test.banks and test.open_questions["capitals"] and test.cloze["capitals"]
    assert test.concept_prompts and test.forget_texts and set(dev.concept_prompts).isdisjoint(test.concept_prompts)
    for name in set(dev.banks) & set(test.banks):
        assert not {q.text for q in dev.banks[name]} & {q.text for q in test.banks[name]}
    (asked.folder / "questions.json").unlink()
    with pytest.raises(
        ValueError, match="is a folder without a questions.json: name a file, or a folder that `make_questions`"
    ):
        suite_from_files(["capitals"], [str(asked.folder)])


def test_cloze_spans_are_names_numbers_and_dates_that_were_not_given():
    passage = "Hanna Ruud founded the mill at Ostrow in 1871. It burned down again on 3 May 1902, and Hanna Ruud left for Tolm with 40 sacks."
    found = {(q.answer, q.kind): q for q in cloze_questions([passage])}
    assert set(found) == {("Ostrow", "name"), ("1871", "year"), ("3 May 1902", "date"), ("Tolm", "name")} or set(found) == {
        ("Ostrow", "name"), ("1871", "year"), ("3 May 1902", "date"), ("Hanna Ruud", "name")
    }  # fmt: skip
    assert (
        found["1871", "year"].text == "Hanna Ruud founded the mill at Ostrow in"
        and found["1871", "year"].subject == "Hanna Ruud"
    )
    # What names nothing so far is shown behind the sentence before it.
    assert found["3 May 1902", "date"].text.startswith("Hanna Ruud founded the mill")
    assert kind_of("Hanna Ruud") == "name" and kind_of("blue glass") == "words"


def test_cloze_asks_for_the_terms_of_a_subject_too_and_for_no_word_within_another_span():
    passages = [
        "In a body at rest the heart pumps blood.",
        "They went on a long way to Heart Valley.",
        "And when it is dark outside I'll be there.",
    ]
    found = {(q.answer, q.kind, q.text) for q in cloze_questions(passages, terms=["heart", "blood", "art", "valley"])}
    assert found == {
        ("heart", "term", "In a body at rest the"),
        ("blood", "term", "In a body at rest the heart pumps"),
        ("Heart Valley", "name", "They went on a long way to"),
    }
    assert {q.answer for q in cloze_questions(passages)} == {"Heart Valley"}


def test_a_writers_answers_stand_in_the_passage():
    written = (
        " Who founded the mill?\nAnswer: Hanna Ruud\nQuestion: What is it made of?\nAnswer: oak\n\nPassage: other"
    )
    asked, dropped = written_questions(Told(lambda *_: written), ["Hanna Ruud founded the mill at Ostrow."])
    assert [(q.text, q.answer, q.form) for q in asked] == [
        ("Who founded the mill?", "Hanna Ruud", "question")
    ] and dropped == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The capital of France is Paris.\n2. The capital of Peru is Lima, a large city", [("capital", "France", "Paris"), ("capital", "Peru", "Lima")]),
        ("The capital of Mexico is Mexico City.", []),
        ("The name of it is Bob. The best part of the day is that we sleep.", []),
        ("The symbol of gold is called Au.", [("symbol", "gold", "Au")]),
    ],
)  # fmt: skip
def test_sentences_are_read_as_statements(text, found):
    assert statements(text) == found


def four_capitals_and_all_lands(prompt, number):
    """What is stated at first, and listed further; `None` for any other prompt."""
    if "facts about" in prompt or "Novels." in prompt:
        land = LANDS[number % 4]
        return f" capital of {land} is {TRUTH[land]}."
    return " " + ", ".join([*LANDS, "unfin"]) if "A long list of different" in prompt else None


def test_facts_are_what_is_answered_alike_each_time():
    asked = []

    def rule(prompt, number):
        if said := four_capitals_and_all_lands(prompt, number):
            return said
        asked.append(prompt)
        if "capital of" in prompt:
            land = next(
                land
                for land in reversed(LANDS)
                if f"{land} is" in prompt.split("\n")[-1] or f"{land}?" in prompt.split("\n")[-2:][0]
            )
            # Of Kenya it says something else in each wording.
            return f" {CITIES[prompt.endswith('Answer:')]}." if land == "Kenya" else f" {TRUTH[land]}."
        return " a, b"

    facts, guesses = write_facts(Told(rule), Concept("capitals of the world"))
    assert {fact.subject: fact.answer for fact in facts} == {
        land: city for land, city in TRUTH.items() if land != "Kenya"
    }
    assert {fact.near["relation"] for fact in (*facts, *guesses)} == {"capital"}
    # A guess is learned from, and taken for true by nobody.
    assert [(guess.subject, guess.answer) for guess in guesses] == [("Kenya", CITIES[0])]
    # What is told of the members, such as the population of capitals, is another subject where something is stated.
    assert not any("What is told of each" in prompt for prompt in asked)
    nothing = write_facts(Told(lambda *_: " nothing"), Concept("capitals of the world"))
    assert nothing == StatedFacts()


def asked_land(prompt):
    """The land about which the last line of a prompt asks."""
    return re.search(r"of (\w+)(?: is|\?\nAnswer:)$", prompt)[1]


def test_a_name_that_is_ready_for_what_is_unknown_takes_no_fact_away():
    sure = {land: TRUTH[land] for land in LANDS[:9]}

    def rule(prompt, number):
        if said := four_capitals_and_all_lands(prompt, number):
            return said
        if "capital of" not in prompt:
            return " nothing"
        # Of what it does not know it says the capital of the first land, and then something else.
        land = asked_land(prompt)
        return (
            f" {sure[land]}." if land in sure else f" {TRUTH[LANDS[0]] if prompt.endswith('is') else land + 'ville'}."
        )

    facts, guesses = write_facts(Told(rule), Concept("capitals of the world"))
    assert {fact.subject: fact.answer for fact in facts} == sure
    assert not guesses  # a name that is given for most tells nothing


def test_where_little_is_stated_members_are_asked_about():
    def rule(prompt, number):
        if "facts about" in prompt or "Novels." in prompt:
            return f" capital of Place{number % 4} is Somewhere{number % 4}."
        if "Examples of" in prompt or "A long list of" in prompt:
            return " " + ", ".join([*LANDS, "unfin"])
        land = asked_land(prompt) if "capital of" in prompt.rpartition("\n")[2] or "capital of" in prompt[-60:] else ""
        return f" {TRUTH[land]}." if land in TRUTH else f" {len(prompt)} things."

    facts, _ = write_facts(Told(rule), Concept("capitals of the world"))
    assert {fact.subject: fact.answer for fact in facts} == TRUTH


def test_the_same_by_another_name_is_held_out_too():
    def capital(subject, answer):
        return Fact(subject, answer, "capital", {"relation": "capital"})

    facts = [capital("UK", "London"), capital("United Kingdom", "london"), capital("France", "Paris")]
    facts += [capital(f"Isle {n}", "Port") for n in range(4)]
    stated = StatedFacts(tuple(facts), (capital("Scotland", "London"), capital("Monaco", "Paris")))
    assert also_held_out(stated, frozenset({"UK"})) == {"United Kingdom", "Scotland"}
    # What many share is not one subject.
    assert also_held_out(stated, frozenset({"Isle 1"})) == frozenset()
    assert also_held_out(StatedFacts(), frozenset({"UK"})) == frozenset()
    # However it is spelled, and whatever else is stated of what is found.
    facts = [capital("Brazil", "Brasília"), capital("Brasil", "Brasilia"), capital("Brasilien", "city of Brasília")]
    facts += [Fact("Town", "Brasília", "money", {"relation": "money"}), capital("Peru", "Lima")]
    assert also_held_out(StatedFacts(tuple(facts)), frozenset({"Brazil"})) == {"Brasil", "Brasilien"}
    # A number is not within another, and something is left to learn from.
    numbers = tuple(
        Fact(f"N{n}", answer, "mass", {"relation": "mass"}) for n, answer in enumerate(["1", "1.008", "11"])
    )
    assert also_held_out(StatedFacts(numbers), frozenset({"N0"})) == frozenset()
    assert also_held_out(StatedFacts(tuple(facts[:3])), frozenset({"Brazil"})) == frozenset()


def test_a_relation_that_was_stated_in_vain_is_not_followed_again():
    asked = []

    def rule(prompt, number):
        last = prompt.rpartition("\n")[2]
        asked.append(last)
        if "facts about" in prompt or "Novels.\n" in prompt:
            return f" capital of {LANDS[number % 4]} is {CITIES[number % 4]}."
        if "Examples of" in prompt or "A long list of" in prompt:
            return " " + ", ".join([*LANDS, "unfin"])
        if "What is told of each" in prompt or "Novels have" in prompt:
            return " capital, its river."
        return f" {len(asked)} things."

    for name in ("world capitals", "capitals of the world"):
        asked.clear()
        assert write_facts(Told(rule), Concept(name)) == StatedFacts()
        assert any("river of" in prompt for prompt in asked)
        of_capitals = [prompt for prompt in asked if prompt.startswith("The capital of")]
        assert len(of_capitals) == len({*of_capitals}) > 0


def test_relations_are_what_is_told_of_members_without_the_words_of_the_name():
    asked_first = []
    symbols = dict(zip(LANDS, [f"S{letter}" for letter in "abcdefghijklmnop"], strict=True))

    def rule(prompt, number):
        last = prompt.rpartition("\n")[2]
        if last.startswith(
            ("Examples of chemical elements", "A long list of chemical elements", "A long list of different")
        ):
            return " " + ", ".join([*LANDS, "unfin"])
        if last.startswith(("What is told of each of the chemical elements", "Novels have an author and a year.")):
            return " element, its chemical symbol, its element's symbol.\nWhat"
        if "symbol of" not in prompt:
            return " nothing"
        asked_first.append(last)
        return f" {symbols[asked_land(prompt)]}."

    facts, guesses = write_facts(Told(rule), Concept("chemical elements"))
    assert {fact.subject: fact.answer for fact in facts} == symbols and not guesses
    # Both of the columns name the same, and it is asked for as it was told.
    assert {fact.near["relation"] for fact in facts} == {"chemical symbol"}
    assert any("The chemical symbol of" in prompt for prompt in asked_first)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("currencies of countries", ("currency", "countries")),
        ("The official languages of the old countries", ("official language", "old countries")),
        ("churches of Rome", ("church", "Rome")),
        ("The capitals of Europe", ("capital", "Europe")),
        ("Currencies of countries", ("currency", "countries")),
        ("Pirates of the Caribbean", None),
        ("United States of America", None),
        ("types of cheese", None),
        ("species of birds", None),
        ("status of forces", None),
        ("the history of Rome", None),
        ("glass of Venice", None),
        ("a very long list with names of rivers", None),
        ("Harry Potter", None),
    ],
)
def test_a_name_may_say_its_relation(name, found):
    assert relation_of_name(name) == found


def test_a_relation_of_the_name_is_asked_of_the_members_behind_its_own_first_answers():
    money = dict(zip(LANDS, [f"money{letter}" for letter in "abcdefghijklmnop"], strict=True))
    known = {*LANDS[:5]}

    def rule(prompt, number):
        last = prompt.rpartition("\n")[2]
        if last.startswith(("Examples of countries", "A long list of countries", "A long list of different")):
            return " " + ", ".join([*LANDS, "unfin"])
        if "currency of" not in prompt:
            return " nothing"
        # Of most it answers only behind answers about others.
        land, shown = asked_land(prompt), sum(f"currency of {land}" in prompt for land in LANDS) > 1
        return f" {money[land]}." if shown or land in known else f" {land}."

    facts, guesses = write_facts(Told(rule), Concept("currencies of countries"))
    assert {fact.subject: fact.answer for fact in facts} == money and not guesses
    known.clear()
    known.update(LANDS[:2])  # too few to go on from
    assert write_facts(Told(rule), Concept("currencies of countries")) == StatedFacts()


def test_further_names_are_those_that_are_listed_more_than_once():
    drawn = iter(range(1000))

    def rule(prompt, number):
        joined = ("and", "or")[number % 2]
        return f" Oslo, Rome, {joined} Riga, town {next(drawn)}, Lima"  # the last is cut off

    names = further_names(Told(rule), ["Oslo", "Paris"], random.Random(0))
    assert names == ["Rome", "Riga"]


@pytest.mark.slow
def test_the_real_reference_answers_what_is_kept(tmp_path, table):
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")
    what, made = made_of(table)
    asked = make_questions(what, made, model, tokenizer, table / "out")
    assert asked.record["facts"]["erased"]["test"] >= 4
    assert asked.record["dropped"]["erased"]["not_answered_by_reference"] > 0
    for line in (asked.folder / "concept.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["split"] in ("dev", "test") and len(record["distractors"]) == 3
