import pytest
import torch

from elm_trainer.data.facts import load_bank
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.likelihood import letter_prompt, score_letters


def slow_letters(model, tokenizer, questions):
    """One forward pass per question; the letters are one token each."""
    letters = [tokenizer(f" {letter}")["input_ids"] for letter in "ABCD"]
    verdicts = []
    for question in questions:
        a, b, c, d = question.options
        prompt = f"Question: {question.text}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        scores = [logits[token].item() for [token] in letters]
        verdicts.append(question.options[scores.index(max(scores))] == question.answer)
    return verdicts


def test_the_options_stand_behind_their_letters():
    question = Question("Which city lies by the Tiber?", ("Rome", "Oslo", "Bern"), "Rome")

    assert letter_prompt(question) == "Question: Which city lies by the Tiber?\nA. Rome\nB. Oslo\nC. Bern\nAnswer:"


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_verdicts_agree_with_questions_asked_one_by_one(sharp_model, tokenizer, questions, batch_size):
    verdicts = score_letters(sharp_model, tokenizer, questions, batch_size=batch_size)

    assert verdicts == slow_letters(sharp_model, tokenizer, questions)
    assert 0 < sum(verdicts) < len(verdicts)


def test_a_model_that_always_says_b_is_right_where_b_is(tiny_model, tokenizer):
    [token] = tokenizer(" B")["input_ids"]
    questions = load_bank("general")[:12]
    # The head answers with the bias alone, which favours one token.
    tiny_model.lm_head = torch.nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
        tiny_model.lm_head.bias.zero_()
        tiny_model.lm_head.bias[token] = 1

    verdicts = score_letters(tiny_model, tokenizer, questions)

    assert verdicts == [question.options[1] == question.answer for question in questions]
    assert any(verdicts)


def test_no_questions_are_an_error(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="`questions` is empty"):
        score_letters(tiny_model, tokenizer, [])


def test_more_options_than_letters_are_an_error(tiny_model, tokenizer):
    question = Question("Which number?", tuple(map(str, range(27))), "3")

    with pytest.raises(ValueError, match="27 options"):
        score_letters(tiny_model, tokenizer, [question])
