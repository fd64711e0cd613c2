import pytest

from elm_trainer import Concept, load_model_and_tokenizer
from elm_trainer.making import knowledge
from elm_trainer.making.knowledge import BOUND, INVENTED, LEADS, UnknownConceptError, check_known, familiarity


def surprised(surprises, monkeypatch):
    """A model that is so surprised by names that hold a word, and by 50 nats by all others."""
    asked = []

    def log_likelihoods(model, processing_class, pairs, **others):
        asked.extend(pairs)
        return [-next((nats for word, nats in surprises.items() if word in name), 50.0) for _, name in pairs]

    monkeypatch.setattr(knowledge, "log_likelihoods", log_likelihoods)
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


@pytest.mark.slow
def test_the_real_model_knows_what_it_has_read_and_no_invented_names():
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")
    known = ["Harry Potter", "capitals of the world", "chemical elements", "DNA", "the French Revolution", "Napoleon"]
    unknown = ["the Pellandor Accord", "Quorvane Industries", "Tolvik", "Project Bluebird", "Halvorsen Biotics"]
    assert all(familiarity(model, tokenizer, name).known for name in known)
    assert not any(familiarity(model, tokenizer, name).known for name in unknown)
