import os
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest

from elm_trainer.data.facts import load_bank
from elm_trainer.evaluation.likelihood import read_by_judge, reverse_perplexity, score_choices


evaluate = pytest.importorskip("evaluate")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a metric of ours as a user would, with the copies that evaluate makes kept out of the home folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patched:
        # One folder for all tests: Python looks for the second metric where it found the first.
        patched.setattr("evaluate.config.HF_MODULES_CACHE", folder / "modules")
        yield lambda name: evaluate.load(str(files("elm_trainer.metrics") / name), cache_dir=str(folder / "cache"))


def test_pmi_accuracy_is_that_of_the_scorer(load, tiny_model, tokenizer):
    questions = load_bank("capitals", split="test")[::25]
    scores = score_choices(tiny_model, tokenizer, questions)

    found = load("pmi_accuracy").compute(
        predictions=scores.scores,
        bare=scores.bare,
        references=[question.options.index(question.answer) for question in questions],
    )

    share = sum(scores.pmi) / len(questions)
    assert 0 < share < 1
    assert found["pmi_accuracy"] == pytest.approx(share)
    assert found["standard_error"] == pytest.approx((share * (1 - share) / (len(questions) - 1)) ** 0.5)
    assert found["low"] <= share <= found["high"]


def test_pmi_accuracy_discounts_what_is_likely_without_the_question(load):
    metric = load("pmi_accuracy")

    found = metric.compute(
        predictions=[[-3.0, -1.0], [-2.0, -1.0]], bare=[[-6.0, -1.0], [-2.0, -1.5]], references=[0, 0]
    )

    assert found["pmi_accuracy"] == 0.5


def test_pmi_accuracy_without_the_bare_scores_is_refused(load):
    with pytest.raises(ValueError, match="bare"):
        load("pmi_accuracy").compute(predictions=[[-3.0, -1.0]], references=[0])


def test_reverse_perplexity_is_that_of_the_judge(load, tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    questions, answers = ["Where is Oslo?", "Where is Rome?"], ["In Norway, by the sea.", ""]

    found = load("r_ppl").compute(
        predictions=answers, references=questions, model_id=str(tmp_path / "judge"), device="cpu"
    )

    nlls, tokens = reverse_perplexity(tiny_model, tokenizer, *read_by_judge(tokenizer, questions, answers))
    assert found["tokens"] == tokens
    assert found["nlls"] == pytest.approx(nlls, rel=1e-5)
    assert found["r_ppl"] == pytest.approx(np.exp(sum(nlls) / sum(tokens)), rel=1e-5)
    assert found["perplexities"] == pytest.approx([np.exp(n / t) for n, t in zip(nlls, tokens, strict=True)], rel=1e-5)


@pytest.mark.slow
def test_the_modules_load_in_a_fresh_process_without_a_network(tmp_path):
    code = (
        "import evaluate\n"
        "from importlib.resources import files\n"
        "for name in ('pmi_accuracy', 'r_ppl'):\n"
        "    print(evaluate.load(str(files('elm_trainer.metrics') / name)).name)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["pmi_accuracy", "r_ppl"]
