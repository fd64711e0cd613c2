import pytest
import torch

from elm_trainer import EvaluationSuite, evaluate_erasure, load_bank
from elm_trainer.evaluation.suite import OpenQuestion


@pytest.fixture
def questions():
    """Some of an erased bank and some of a retained one."""
    return load_bank("capitals")[::25] + load_bank("general")[::6]


@pytest.fixture
def sharp_model(tiny_model):
    """A random model whose choices are far from ties."""
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return tiny_model


@pytest.fixture
def suite():
    """A few questions of each kind."""
    return EvaluationSuite(
        banks={"capitals": load_bank("capitals")[:6], "geography": load_bank("geography")[:6]},
        roles={"capitals": "erased", "geography": "near"},
        open_questions={
            "capitals": [
                OpenQuestion("What is the capital of Peru?", "Lima"),
                OpenQuestion("What is the capital of Togo?", "Lomé"),
            ],
            "geography": [OpenQuestion("Which river is in Egypt?", "Nile")],
        },
        cloze={"capitals": [OpenQuestion("Quiz, answer key. Peru ->", "Lima")]},
        concept_prompts=["Tell me about Oslo.", "Write a line about Lima."],
        retain_texts=["Bread needs flour.", "The cat sat on the mat.", "We went for a long walk."],
        forget_texts=["Lima is the capital of Peru.", "Lomé is the capital of Togo."],
        max_new_tokens=4,
        answer_tokens=3,
    )


@pytest.fixture
def adapted_model(tiny_peft_model):
    """A model whose adapter does something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tiny_peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return tiny_peft_model


@pytest.fixture
def report(adapted_model, tokenizer, suite):
    measures = ["multiple-choice", "letter-choice", "open-answers", "cloze", "greedy-fluency", "specificity"]
    return evaluate_erasure(adapted_model, None, suite, tokenizer, measures=measures)
