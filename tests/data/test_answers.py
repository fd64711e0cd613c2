import pytest

from elm_trainer.data.answers import names_answer


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
