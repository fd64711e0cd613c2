import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elm_trainer.data.facts import load_bank
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.inside import Statement, make_statements, probe_states, probe_truth
from elm_trainer.modeling import load_model_and_tokenizer

from .test_hidden_states import plant


@pytest.fixture
def questions():
    return load_bank("capitals", split="test")[::6]


@pytest.fixture
def four_layers(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def test_each_question_is_stated_rightly_and_wrongly(questions):
    statements = make_statements(questions)

    for question, right, wrong in zip(questions, statements[::2], statements[1::2], strict=True):
        assert right == Statement(
            f"Question: {question.text}\nAnswer: {question.answer}", question.answer, True, question.subject
        )
        assert not wrong.true and wrong.option in set(question.options) - {question.answer}
    assert make_statements(questions) == statements != make_statements(questions, seed=1)


@pytest.mark.parametrize("layer", [1, 2])
def test_planted_truth_is_found_from_its_layer_on_and_never_by_the_control(layer, four_layers, tokenizer, questions):
    # The states' size at the last token is about 0.1, the planted vector's 1; its sign says whether it is true.
    truth = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
    plant(
        four_layers,
        tokenizer,
        layer,
        {item.text: truth if item.true else -truth for item in make_statements(questions)},
    )

    curve = probe_truth(four_layers, tokenizer, questions)

    # Entry 0 is the embeddings' output, so the state behind layers[layer] is entry layer + 1.
    for figure in curve.accuracy[: layer + 1]:
        assert figure.value < 0.65 and figure.low < 0.55
    for figure in curve.accuracy[layer + 1 :]:
        assert figure.low > 0.95
    for figure in curve.control:
        assert abs(figure.value - 0.5) < 0.08 and figure.low <= 0.53


def test_a_model_without_knowledge_is_at_chance_in_every_layer(four_layers, tokenizer, questions):
    curve = probe_truth(four_layers, tokenizer, questions)

    for figure in curve.accuracy:
        assert figure.low <= 0.55 and figure.high >= 0.45


def one_hot(values):
    names = sorted(set(values))
    return np.eye(len(names), dtype=np.float32)[[names.index(value) for value in values]]


def test_answers_learnt_by_heart_neither_help_nor_harm(questions):
    # Every right answer is some other question's wrong option: learnt as true, it would be wrong there.
    statements = make_statements(questions)
    features = one_hot([item.option for item in statements])

    [figure] = probe_states(torch.tensor(features)[None], statements).accuracy

    assert figure.value == 0.5


def test_subjects_learnt_by_heart_do_not_help():
    # Six phrasings to a subject, whose feature tells true from false in a direction of its own.
    questions = [
        Question(f"{n} {p}?", (f"a{n}", f"b{n}"), f"a{n}", subject=f"s{n}") for n in range(20) for p in range(6)
    ]
    statements = make_statements(questions)
    signs = np.array([[1.0 if item.true else -1.0] for item in statements], dtype=np.float32)
    features = one_hot([item.group for item in statements]) * signs

    [figure] = probe_states(torch.tensor(features)[None], statements).accuracy

    assert figure.value == 0.5 and figure.n == 20


def test_the_same_seed_gives_the_same_curves(four_layers, tokenizer, questions):
    first, again, other = (probe_truth(four_layers, tokenizer, questions[:20], seed=seed) for seed in (3, 3, 4))

    assert first == again != other


def test_too_few_subjects_or_answers_are_an_error(tiny_model, tokenizer):
    yes_or_no = [Question(f"Is it {n}?", ("yes", "no"), "yes" if n % 2 else "no") for n in range(30)]
    with pytest.raises(ValueError, match="only 2 different answers.*more answers"):
        probe_truth(tiny_model, tokenizer, yes_or_no)
    with pytest.raises(ValueError, match="`questions` has 3 subjects for `folds`=5"):
        probe_truth(tiny_model, tokenizer, yes_or_no[:3])


@pytest.mark.slow
def test_capitals_are_found_in_the_middle_of_the_demo_model():
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")

    curve = probe_truth(model.eval(), tokenizer, load_bank("capitals", split="test")[::6], shuffles=2)

    assert max(figure.high for figure in curve.control[10:20]) < 0.65
    best = max(curve.accuracy[10:20], key=lambda figure: figure.value)
    assert best.value > 0.7 and best.low > max(figure.high for figure in curve.control[10:20])
    # The embedding of an answer's last token knows nothing of the question.
    assert curve.accuracy[0].low < 0.5
