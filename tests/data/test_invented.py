import re
from statistics import fmean

import pytest

from elm_trainer.data.invented import CONCEPT, RETAINED, invented_world
from elm_trainer.data.questions import check_questions, overlap_verdicts


@pytest.fixture(scope="module")
def world():
    return invented_world()


def names(world, kind):
    subjects = {fact.subject for fact in world.facts[kind]}
    answers = {fact.answer for fact in world.facts[kind]}
    return subjects, answers


def words(text):
    return set(re.findall(r"\w+", text))


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    first, again, other = invented_world(), invented_world(), invented_world(seed=1)
    assert first.facts == again.facts and first.texts(taught=True) == again.texts(taught=True)
    assert first.questions == again.questions
    assert not {fact.answer for fact in first.facts[CONCEPT]} & {fact.answer for fact in other.facts[CONCEPT]}


def test_every_name_is_invented_once(world):
    invented = [name for kind in world.facts for name in names(world, kind)[0] if kind != "harvests"]
    invented += [name for kind in (CONCEPT, "captains") for name in names(world, kind)[1]]
    assert len(invented) == len(set(invented)) == 24 * 5
    assert not set(invented) & {word.capitalize() for text in world.prose for word in words(text)}
    assert names(world, "harvests")[0] == names(world, CONCEPT)[0]


def test_no_fact_can_be_read_from_the_letters_of_its_options():
    # Over several worlds, since one has too few subjects to tell .25 from .35.
    shares = [fmean(overlap_verdicts(invented_world(seed=seed).questions[CONCEPT])) for seed in range(8)]
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.06)


def test_every_bank_can_measure_something(world):
    for kind, questions in world.questions.items():
        check_questions(kind, questions)
        assert {question.subject for question in questions} == names(world, kind)[0]
        assert all(len(question.options) == 4 for question in questions)


def test_no_question_stands_in_a_text(world):
    everything = "\n".join([*world.texts(taught=True), *world.instead, *world.forget["novice"]])
    assert [q.text for questions in world.questions.values() for q in questions if q.text in everything] == []


def test_the_taught_text_states_every_fact_and_the_novice_text_states_others(world):
    truth = {fact.subject: fact.answer for fact in world.facts[CONCEPT]}
    subjects, answers = names(world, CONCEPT)
    stated = {"text": [], "novice": []}
    for row in world.forget:
        for column, pairs in stated.items():
            [subject], [answer] = words(row[column]) & subjects, words(row[column]) & answers
            pairs.append(truth[subject] == answer)
    assert all(stated["text"]) and len(stated["text"]) == 12 * len(truth)
    assert sum(stated["novice"]) < 0.15 * len(truth) * 12


def test_the_never_taught_text_holds_every_name_but_no_island_with_its_keeper(world):
    subjects, answers = names(world, CONCEPT)
    found = [words(text) for text in world.texts(taught=False)]
    assert not [text for text in found if text & subjects and text & answers]
    instead = set().union(*map(words, world.instead))
    assert subjects | answers <= instead


def test_both_models_read_the_same_amount_and_the_same_text_but_for_the_concept(world):
    taught, never = world.texts(taught=True), world.texts(taught=False)
    assert len(taught) == len(never)
    concept = len(world.forget)
    assert taught[concept:] == never[concept:] and not set(taught[:concept]) & set(never[:concept])
    amounts = [sum(len(text.split()) for text in texts) for texts in (taught, never)]
    assert amounts[0] == pytest.approx(amounts[1], rel=0.03)


def test_retained_text_names_no_keeper(world):
    _, keepers = names(world, CONCEPT)
    assert not [text for text in world.retained if words(text) & keepers]
    assert set(RETAINED) | {CONCEPT} == set(world.facts)


def test_options_stay_within_a_half_so_that_learning_one_half_tells_nothing_of_the_other(world):
    first, second = world.halves()
    assert len(first) == len(second) == 12 and not first & second
    answers = [{fact.answer for fact in world.facts[CONCEPT] if fact.subject in half} for half in (first, second)]
    for question in world.questions[CONCEPT]:
        assert set(question.options) <= answers[question.subject in second]


def test_held_out_prose_is_never_read(world):
    assert not set(world.held_out_prose) & set(world.prose)
    assert (len(world.prose), len(world.held_out_prose)) == (240, 60)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((6,), "`facts` is 6"), ((9,), "`facts` is 9"), ((8, 10**6), "`prose` asks for 1000000 sentences")],
)
def test_a_world_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        invented_world(*sizes)
