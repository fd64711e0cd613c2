import pytest

from elm_trainer.evaluation.fluency import language_kept, language_of


pytest.importorskip("py3langid")

QUESTION = "What should I see in the capital of France?"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Oslo is a nice city on the coast, with many museums.", "en"),
        ("La capitale est une belle ville", "fr"),
        ("Die Hauptstadt liegt an einem großen Fluss", "de"),
        ("La ciudad tiene muchos museos y un puerto antiguo", "es"),
        ("столица этой страны очень красива", "ru"),
        ("この国の首都はとても美しいです", "ja"),
    ],
)
def test_a_sentence_is_in_its_language(text, language):
    assert language_of(text) == language


@pytest.mark.parametrize("text", ["", "  \n", "42", "1. 2. 3.", "Paris", "Paris.", "...", "asdf qwer zxcv"])
def test_what_is_no_sentence_is_undecided(text):
    assert language_of(text) is None


def test_an_answer_in_another_language_than_its_prompt_is_not_kept():
    verdicts = language_kept(
        [QUESTION, QUESTION, QUESTION, "Paris", "Que faut-il voir dans la capitale de la France ?"],
        [
            "You should see the old town and the river, which are very beautiful.",
            "Il faut voir la vieille ville et la rivière, qui sont très belles.",
            "Paris",
            "You should see the old town and the river.",
            "Il faut voir la vieille ville et la rivière, qui sont très belles.",
        ],
    )

    assert verdicts == [True, False, None, None, True]


def test_every_prompt_wants_an_answer():
    with pytest.raises(ValueError):
        language_kept([QUESTION], [])
