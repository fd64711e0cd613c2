import pytest
import torch

from elm_trainer.data.facts import load_bank
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.inside import logit_lens

from .test_hidden_states import ARCHITECTURES, build_model, plant


@pytest.fixture
def questions():
    return load_bank("capitals", split="test")[::20]


def first_token(tokenizer, question, option):
    """The token after the prompt, which these tokenizers never merge with what follows."""
    prompt = tokenizer(f"Question: {question.text}\nAnswer:")["input_ids"]
    return tokenizer(f"Question: {question.text}\nAnswer: {option}")["input_ids"][len(prompt)]


def real_logits(model, tokenizer, question):
    with torch.no_grad():
        ids = tokenizer(f"Question: {question.text}\nAnswer:", return_tensors="pt")["input_ids"]
        return model(ids, output_hidden_states=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_layer_says_what_the_model_says(architecture, tokenizer, questions):
    model = build_model(architecture, len(tokenizer))
    # Gemma 2 caps its logits, which the lens leaves out; the cap is undone here.
    cap = getattr(model.config, "final_logit_softcapping", None)

    scores = logit_lens(model, tokenizer, questions, batch_size=7)

    right = []
    for row, index in enumerate(scores.questions):
        question = questions[index]
        logits = real_logits(model, tokenizer, question).logits[0, -1].double()
        if cap:
            logits = torch.atanh(logits / cap) * cap
        expected = [float(logits[first_token(tokenizer, question, option)]) for option in question.options]
        assert scores.logits[-1][row] == pytest.approx(expected, abs=1e-4)
        right.append(question.options[expected.index(max(expected))] == question.answer)
    assert scores.accuracy[-1].value == pytest.approx(sum(right) / len(right))
    assert len(scores.questions) > 10


def test_earlier_layers_pass_the_models_own_norm_and_head(tokenizer, questions):
    model = build_model("llama", len(tokenizer))

    scores = logit_lens(model, tokenizer, questions[:3])

    for row, index in enumerate(scores.questions):
        states = real_logits(model, tokenizer, questions[index]).hidden_states
        for layer in (0, 1):
            with torch.no_grad():
                logits = model.lm_head(model.model.norm(states[layer][0, -1]))
            tokens = [first_token(tokenizer, questions[index], option) for option in questions[index].options]
            assert scores.logits[layer][row] == pytest.approx(logits[tokens].tolist(), abs=1e-4)


def test_a_layer_that_writes_the_answer_is_found_and_those_before_are_not(tokenizer):
    options = ("Oslo", "Rome", "Lima", "Bern")
    questions = [Question(f"Number {n}?", options, options[n % 4], subject=f"s{n // 2}") for n in range(40)]
    model = build_model("llama", len(tokenizer))
    model.model.norm.weight.data.fill_(1)
    rows = {q.text: model.lm_head.weight[first_token(tokenizer, q, q.answer)].detach() for q in questions}
    before = logit_lens(model, tokenizer, questions)
    plant(model, tokenizer, 1, {f"Question: {text}\nAnswer:": 1000 * row / row.norm() for text, row in rows.items()})

    written = logit_lens(model, tokenizer, questions)

    assert written.accuracy[:2] == before.accuracy[:2]
    assert written.accuracy[2].value == 1 and before.accuracy[2].value < 0.7
    # Two questions to a subject.
    assert written.accuracy[2].n == 20 and written.chance == 0.25


def test_the_batch_size_changes_no_logit(tokenizer, questions):
    model = build_model("llama", len(tokenizer))
    one, many = (logit_lens(model, tokenizer, questions, batch_size=size) for size in (1, 32))

    torch.testing.assert_close(torch.tensor(one.logits), torch.tensor(many.logits), atol=1e-4, rtol=1e-4)
    assert one.accuracy == many.accuracy


def test_options_that_begin_alike_are_skipped(tiny_model, tokenizer):
    questions = [
        Question("Which city?", ("San Juan", "San Salvador", "Rome", "Bern"), "Rome"),
        Question("Which river?", ("Rhine", "Nile"), "Nile"),
    ]
    scores = logit_lens(tiny_model, tokenizer, questions)

    assert scores.questions == [1] and scores.chance == 0.5 and len(scores.logits[0]) == 1
    with pytest.raises(ValueError, match="None of the 1 `questions`"):
        logit_lens(tiny_model, tokenizer, questions[:1])
