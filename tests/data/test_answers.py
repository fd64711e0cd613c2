import pytest

from elm_trainer.data.questions import given_answer, names_answer


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
