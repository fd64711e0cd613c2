"""Multiple choice by ranking the options: log-likelihood, the same by length, and pointwise mutual information (PMI)."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import Question
from .likelihood import log_likelihoods


PROMPT = "Question: {question}\nAnswer:"
BARE_PROMPT = "Answer:"
_OPTIONS = 4


@dataclass(frozen=True)
class ChoiceScores:
    """What each question was answered, in the order of the questions.

    Attributes:
        log_likelihood (`list[bool]`): Whether the most likely option is the right one.
        normalized (`list[bool]`): The same by log-likelihood per character (the harness's `acc_norm`).
        pmi (`list[bool]`): Whether the option of highest PMI is the right one.
        removed (`list[bool]`): Whether the option that is likeliest after a bare `"Answer:"` is the right one. A bank
            on which this is far from chance can be answered without its questions.
        scores (`list[list[float]]`): Log-likelihood of each option, in nats.
        bare (`list[list[float]]`): Log-likelihood of each option after a bare `"Answer:"`, in nats.
    """

    log_likelihood: list[bool]
    normalized: list[bool]
    pmi: list[bool]
    removed: list[bool]
    scores: list[list[float]]
    bare: list[list[float]]


def score_choices(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    prompt: str = PROMPT,
    description: str = "Multiple choice",
    over_ranks: bool = False,
) -> ChoiceScores:
    """Answer multiple-choice questions by ranking the options.

    An option's log-likelihood is the sum of its tokens' log-probabilities after the prompt. Its PMI is
    that minus the same sum after a bare `"Answer:"`, which removes the preference for frequent strings.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Model to question; put in evaluation mode for the call, then back.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        questions (`Sequence[Question]`):
            Questions, each with its options; the first option need not be the right one.
        batch_size (`int`, *optional*, defaults to `16`):
            Questions per forward pass.
        prompt (`str`, *optional*, defaults to `"Question: {question}\\nAnswer:"`):
            What stands before an option.
        description (`str`, *optional*, defaults to `"Multiple choice"`):
            Label of the progress bar.
        over_ranks (`bool`, *optional*, defaults to `False`):
            Whether the processes of a launch share the work; then all of them must call this.

    Returns:
        [`ChoiceScores`]: one verdict per question and rule.

    Raises:
        ValueError: if there are no questions.
    """
    if not questions:
        raise ValueError("`questions` is empty, so there is nothing to score: pass at least one Question.")
    options = sorted({option for question in questions for option in question.options})
    asked = [
        (prompt.format(question=question.text), f" {option}") for question in questions for option in question.options
    ]
    found = log_likelihoods(
        model,
        processing_class,
        [(BARE_PROMPT, f" {option}") for option in options] + asked,
        batch_size=_OPTIONS * batch_size,
        description=description,
        over_ranks=over_ranks,
    )
    alone = dict(zip(options, found, strict=False))
    likelihoods = iter(found[len(options) :])
    scores = [[next(likelihoods) for _ in question.options] for question in questions]
    bare = [[alone[option] for option in question.options] for question in questions]
    lengths = [[len(option) for option in question.options] for question in questions]
    return ChoiceScores(
        log_likelihood=_verdicts(questions, scores),
        normalized=_verdicts(
            questions,
            [[s / n for s, n in zip(*both, strict=True)] for both in zip(scores, lengths, strict=True)],
        ),
        pmi=_verdicts(questions, [pmi(*both) for both in zip(scores, bare, strict=True)]),
        removed=_verdicts(questions, bare),
        scores=scores,
        bare=bare,
    )


def pmi(scores: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Pointwise mutual information of a question with each of its options, in nats.

    Args:
        scores (`Sequence[float]`): Log-likelihood of each option after the question.
        bare (`Sequence[float]`): Log-likelihood of each option after a bare `"Answer:"`.
    """
    return [score - alone for score, alone in zip(scores, bare, strict=True)]


def likeliest(values: Sequence[float]) -> int:
    """Index of the largest value; the first of equals, as in the harness."""
    return max(range(len(values)), key=values.__getitem__)


def _verdicts(questions: Sequence[Question], values: Sequence[Sequence[float]]) -> list[bool]:
    return [
        question.options[likeliest(row)] == question.answer for question, row in zip(questions, values, strict=True)
    ]
