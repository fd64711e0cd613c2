from dataclasses import replace

import pytest
import torch

from elm_trainer.data.facts import load_bank
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.fluency import as_prompt
from elm_trainer.evaluation.likelihood import letter_prompt, score_choices, score_letters


def slow_score(model, tokenizer, prompt, option, space=" "):
    """Log-probability of one option after a prompt: one sequence, no cache, no padding."""
    encoded = tokenizer(f"{prompt}{space}{option}", return_offsets_mapping=True)
    ids = encoded["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(
        logs[position - 1, ids[position]].item()
        for position, (_, end) in enumerate(encoded["offset_mapping"])
        if end > len(prompt)
    )


def slow_choices(model, tokenizer, questions):
    """Verdicts by each rule, every option scored by itself."""
    verdicts = {"log_likelihood": [], "normalized": [], "pmi": [], "removed": []}
    for question in questions:
        scores = {
            option: slow_score(model, tokenizer, f"Question: {question.text}\nAnswer:", option)
            for option in question.options
        }
        bare = {option: slow_score(model, tokenizer, "Answer:", option) for option in question.options}
        rules = {
            "log_likelihood": scores,
            "normalized": {option: score / len(option) for option, score in scores.items()},
            "pmi": {option: score - bare[option] for option, score in scores.items()},
            "removed": bare,
        }
        for rule, values in rules.items():
            verdicts[rule].append(max(values, key=values.get) == question.answer)
    return verdicts


@pytest.mark.parametrize("rule", ["log_likelihood", "normalized", "pmi", "removed"])
def test_verdicts_agree_with_options_scored_one_by_one(sharp_model, tokenizer, questions, rule):
    verdicts = getattr(score_choices(sharp_model, tokenizer, questions, batch_size=8), rule)

    assert verdicts == slow_choices(sharp_model, tokenizer, questions)[rule]
    assert 0 < sum(verdicts) < len(verdicts)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_the_batch_size_changes_no_verdict_and_no_figure(sharp_model, tokenizer, questions, batch_size):
    found = score_choices(sharp_model, tokenizer, questions, batch_size=batch_size)
    expected = score_choices(sharp_model, tokenizer, questions, batch_size=64)

    for rule in ("log_likelihood", "normalized", "pmi", "removed"):
        assert getattr(found, rule) == getattr(expected, rule)
    for figures in ("scores", "bare"):
        for one, other in zip(getattr(found, figures), getattr(expected, figures), strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_the_side_on_which_a_tokenizer_pads_changes_nothing(tiny_model, tokenizer, questions, monkeypatch):
    expected = score_choices(tiny_model, tokenizer, questions)
    monkeypatch.setattr(tokenizer, "padding_side", "right" if tokenizer.padding_side == "left" else "left")

    assert score_choices(tiny_model, tokenizer, questions) == expected


def test_an_option_alone_in_its_batch_is_still_discounted_in_full(sharp_model, tokenizer):
    # Five different options in batches of four: the last in the alphabet is scored after the bare prompt by itself.
    questions = [
        Question(f"Which city lies by river {river}?", ("Addis Ababa", "Bern", "Oslo", last), last)
        for river in range(12)
        for last in ("Rome", "Yamoussoukro and its wide and empty avenues")
    ]

    scores = score_choices(sharp_model, tokenizer, questions, batch_size=1)

    assert scores.pmi == slow_choices(sharp_model, tokenizer, questions)["pmi"]


def test_an_untouched_adapter_gives_the_reference_verdicts(tiny_peft_model, tokenizer, questions):
    adapted = score_choices(tiny_peft_model, tokenizer, questions)
    with tiny_peft_model.disable_adapter():
        assert score_choices(tiny_peft_model, tokenizer, questions) == adapted


def test_the_model_is_handed_back_in_the_mode_it_came_in(tiny_model, tokenizer, questions):
    tiny_model.train()
    score_choices(tiny_model, tokenizer, questions[:2])

    assert tiny_model.training


def test_each_question_is_scored_in_its_own_form(sharp_model, tokenizer):
    options = ("Oslo", "Bern", "Lima", "Rome")
    questions = [
        Question("Which city?", options, "Oslo", form="chat"),
        Question("We flew back to the capital,", options, "Bern", form="text"),
        Question("Which city?", options, "Lima"),
    ]

    found = score_choices(sharp_model, tokenizer, questions)

    forms = [
        (as_prompt(tokenizer, "Which city?"), as_prompt(tokenizer, ""), ""),
        ("We flew back to the capital,", "Answer:", " "),
        ("Question: Which city?\nAnswer:", "Answer:", " "),
    ]
    for (prompt, bare, space), scores, alone in zip(forms, found.scores, found.bare, strict=True):
        for option, score, without in zip(options, scores, alone, strict=True):
            assert score == pytest.approx(slow_score(sharp_model, tokenizer, prompt, option, space), abs=1e-4)
            assert without == pytest.approx(slow_score(sharp_model, tokenizer, bare, option, space), abs=1e-4)


def test_without_a_chat_template_a_turn_is_a_plain_question(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    plain = Question("Which city?", ("Oslo", "Bern"), "Oslo")

    assert score_choices(tiny_model, tokenizer, [replace(plain, form="chat")]) == score_choices(
        tiny_model, tokenizer, [plain]
    )


def test_no_questions_are_an_error(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="`questions` is empty"):
        score_choices(tiny_model, tokenizer, [])


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


def test_no_questions_to_answer_by_letter_are_an_error(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="`questions` is empty"):
        score_letters(tiny_model, tokenizer, [])


def test_more_options_than_letters_are_an_error(tiny_model, tokenizer):
    question = Question("Which number?", tuple(map(str, range(27))), "3")

    with pytest.raises(ValueError, match="27 options"):
        score_letters(tiny_model, tokenizer, [question])
