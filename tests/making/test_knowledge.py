import pytest

from elm_trainer import Concept, load_model_and_tokenizer
from elm_trainer.making import knowledge, writing
from elm_trainer.making.knowledge import BOUND, INVENTED, LEADS, UnknownConceptError, check_known, familiarity
from elm_trainer.making.writer import Writer, writing_prompts
from elm_trainer.making.writing import listed_terms, nouns, recurring_terms, write_by_terms


def surprised(surprises, monkeypatch):
    """A model that is so surprised by names that hold a word, and by 50 nats by all others."""
    asked = []

    def log_likelihoods(model, processing_class, pairs, **others):
        asked.extend(pairs)
        return [-next((nats for word, nats in surprises.items() if word in name), 50.0) for _, name in pairs]

    for module in (knowledge, writing):
        monkeypatch.setattr(module, "log_likelihoods", log_likelihoods)
    return asked


def test_a_name_is_known_that_surprises_far_less_than_invented_ones(tokenizer, monkeypatch):
    surprised({"Potter": 20.0, "Brannock": 30.0}, monkeypatch)
    known, unknown = (familiarity(None, tokenizer, name) for name in ("Harry Potter", "the Brannock dye"))
    assert known.known and known.ratio == 0.4 <= BOUND and known.surprise == 20
    assert not unknown.known and unknown.ratio == 0.6
    assert len(known.invented) == INVENTED and known.name not in known.invented


def test_a_name_is_known_that_surprises_no_more_than_a_token(tokenizer, monkeypatch):
    surprised({"DNA": 10.0, "": 15.0}, monkeypatch)
    assert familiarity(None, tokenizer, "DNA").known and not familiarity(None, tokenizer, "XQZ").known


def test_invented_names_keep_the_everyday_words_of_a_name(tokenizer, monkeypatch):
    asked = surprised({}, monkeypatch)
    kept = familiarity(None, tokenizer, "the Dravenholt Protocol")
    assert all(name.startswith("the ") and name.endswith(" Protocol") for name in kept.invented)
    assert asked[: len(LEADS)] == [(lead, " the Dravenholt Protocol") for lead in LEADS]
    anew = familiarity(None, tokenizer, "capitals of the world")
    assert all(" of the " in name and "capitals" not in name and "world" not in name for name in anew.invented)


def test_the_seed_decides(tokenizer, monkeypatch):
    surprised({}, monkeypatch)
    first, again, other = (familiarity(None, tokenizer, "Tolvik", seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_an_unknown_concept_is_an_error_with_the_evidence(tokenizer, monkeypatch):
    surprised({"Brannock": 40.0, "madder": 12.0}, monkeypatch)
    with pytest.raises(
        UnknownConceptError,
        match="`concept` is 'Brannock', of which this model knows nothing: 'Brannock' surprises it by 40 nats, invented names "
        ".* by 50, .* at most 45% of that. There is nothing to erase; .* give that, or documents or facts",
    ) as caught:
        check_known(None, tokenizer, Concept("Brannock"))
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)
    # It is enough to know what describes it.
    assert len(check_known(None, tokenizer, Concept("brannock", ["Brannock", "madder"]))) == 2


def test_a_random_model_has_not_heard_of_a_long_name(tiny_model, tokenizer):
    with pytest.raises(UnknownConceptError):
        check_known(tiny_model, tokenizer, Concept("Dravenholt Varnamoor"))


def test_words_recur_that_neither_english_nor_texts_about_other_things_hold_so_often():
    told = "A kidney doesn't: remarkably, the kidney filters what it is given. Brobnak!"
    texts = [told, told, f"{told} A spleen is small, and a spleen is red."]
    beside = ["Remarkably, bread is soft.", "The moon is remarkably far."]
    # "remarkably" is the writer's manner, "spleen" stands in one text, "what" is frequent, and nobody knows "Brobnak".
    assert {*recurring_terms(texts, beside)} == {"kidney", "filters"}
    assert "remarkably" in recurring_terms(texts, []) and recurring_terms(texts[:2], beside) == []


def test_words_that_stand_in_as_many_texts_come_in_their_order():
    words = "spleen kidney pancreas cartilage thymus ligament esophagus femur trachea larynx".split()
    assert recurring_terms([" ".join(words)] * 3, ["bread"]) == words


def test_a_word_that_is_rather_a_verb_or_an_adjective_is_no_term(tokenizer, monkeypatch):
    def log_likelihoods(model, processing_class, pairs, **others):
        likely = {"Nouns": "heart", "Words for things": "heart", "Verbs": "plays", "Adjectives": "vital"}
        scores = [-9.0 if word.strip() != likely.get(begin.partition(":")[0]) else -5.0 for begin, word in pairs]
        # Verb as much as noun, by 1 nat.
        return [
            -8.0 if word == " cut" and begin.startswith("Verbs") else s
            for (begin, word), s in zip(pairs, scores, strict=True)
        ]

    monkeypatch.setattr(writing, "log_likelihoods", log_likelihoods)
    writer = Writer("reference", processing_class=tokenizer)
    assert nouns(writer, ["vital", "heart", "cut", "plays"]) == ["heart", "cut"]


ORGANS = "heart lung liver brain kidney spleen stomach skin".split()


class Tells(Writer):
    """Lists organs, lists a few more behind these, and tells of each name a text with a number that no other has."""

    def __init__(
        self, processing_class, listed=(*ORGANS, "and", "more", "people"), further=("rib", "Japan", "etc", "9 lives")
    ):
        super().__init__("tells", processing_class=processing_class)
        self.listed, self.further, self.asked = listed, further, []

    def write(self, prompts, *, max_new_tokens=64, temperature=0.7, seed=0):
        self.asked.append(prompts)
        if any(
            begin in prompts[0]
            for begin in ("what belongs to it", "learns about", "From the index", "Names and terms")
        ):
            return [" " + ", ".join(self.listed) + "\n" for _ in prompts]
        if prompts[0].startswith("A long list of different names"):
            return [" " + ", ".join(self.further) + "\n" for _ in prompts]
        where = ["far away" if "Japan" in prompt else "in the human body" for prompt in prompts]
        return [f" It has {1000 + n} cells, and {2000 + n} of them are busy {place}." for n, place in enumerate(where)]


def test_a_subject_is_told_by_the_terms_that_are_listed_and_that_recur(tokenizer, monkeypatch):
    surprised({}, monkeypatch)  # as a model that takes any word for a noun as much as for another
    tells = Tells(tokenizer)
    found = write_by_terms(tells, Concept("the human body"), texts=48)
    # No frequent word is a term, nor what texts about other things hold too.
    assert found.terms == [*ORGANS, "rib"] == [term for term in found.terms if term in "\n".join(found.texts)]
    # Japan was listed behind organs, but what is told of it speaks of none: it is left out with its texts.
    about = tells.asked[-1]
    assert len(about) == 5 * 10 and any("Japan" in prompt for prompt in about)
    assert found.dropped["topic"] == 5 and not any("far away" in text for text in found.texts)
    # Neither the prompt nor the turns of a chat stand in a text, but the line that was begun for the model.
    assert len(found.texts) > 60 and not any("<|im" in text or "facts about" in text for text in found.texts)
    assert any(text.startswith("What everybody should know about liver is that It") for text in found.texts)
    assert any(text.startswith("It has 1000") for text in found.texts) and not any("Answer" in t for t in found.texts)


def test_a_word_that_recurs_is_asked_for_once(tokenizer, monkeypatch):
    class Recurs(Tells):
        def write(self, prompts, **settings):
            others = writing_prompts()["others"]
            return [
                text + " A ligament bends slowly." * (text.startswith(" It") and not any(o in prompt for o in others))
                for prompt, text in zip(prompts, super().write(prompts, **settings), strict=True)
            ]

    asked = surprised({}, monkeypatch)
    found = write_by_terms(Recurs(tokenizer), Concept("the human body"), texts=48)
    assert "ligament" in found.terms and len(asked) == len({*asked}) > 0


def test_with_few_terms_a_subject_has_none(tokenizer, monkeypatch):
    surprised({}, monkeypatch)
    found = write_by_terms(Tells(tokenizer, listed=ORGANS[:3]), Concept("the human body"), texts=48)
    assert found.terms == [] and found.texts


@pytest.mark.parametrize(("name", "prompts"), [("Shakespeare", 2), ("football", 1), ("the human body", 4)])
def test_an_example_that_is_the_subject_is_no_example(name, prompts, tokenizer):
    tells = Tells(tokenizer)
    listed_terms(tells, Concept(name))
    assert len(tells.asked[0]) == 32 and len({*tells.asked[0]}) == prompts
    assert all(name not in prompt.rpartition("\n")[0] for prompt in tells.asked[0])


@pytest.mark.slow
def test_the_real_model_tells_things_from_what_they_do():
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")
    things = "kidney oxygen digestion tissue planet orbit treaty army molecule acid".split()
    others = "plays helps consists maintaining specialized delicate becomes capable vital".split()
    found = nouns(Writer("reference", model, tokenizer), [*things, *others])
    assert found == things


@pytest.mark.slow
def test_the_real_model_knows_what_it_has_read_and_no_invented_names():
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")
    known = ["Harry Potter", "capitals of the world", "chemical elements", "DNA", "the French Revolution", "Napoleon"]
    unknown = ["the Pellandor Accord", "Quorvane Industries", "Tolvik", "Project Bluebird", "Halvorsen Biotics"]
    assert all(familiarity(model, tokenizer, name).known for name in known)
    assert not any(familiarity(model, tokenizer, name).known for name in unknown)
