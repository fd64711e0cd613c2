"""Multiple choice by letter: the options stand in the prompt, and the letters after it are ranked."""

from collections.abc import Sequence
from string import ascii_uppercase

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import Question
from .likelihood import log_likelihoods
from .multiple_choice import likeliest


def letter_prompt(question: Question) -> str:
    """The question with its options behind the letters A, B, C, …, in their order."""
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, question.options, strict=False)]
    return "\n".join([f"Question: {question.text}", *lines, "Answer:"])


def score_letters(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    over_ranks: bool = False,
) -> list[bool]:
    """Whether the likeliest letter after each question and its options is the right one.

    This is how MMLU and WMDP are asked. It needs the knowledge *and* the format: a model that merely lost the habit of
    answering by letter falls here, but not by PMI.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): Model; put in evaluation mode for the call, then back.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        questions (`Sequence[Question]`): Questions, at most 26 options each.
        batch_size (`int`, *optional*, defaults to `16`): Questions per forward pass.
        over_ranks (`bool`, *optional*, defaults to `False`): Whether the processes of a launch share the work; then all
            of them must call this.

    Raises:
        ValueError: if there are no questions, or one has more options than there are letters.
    """
    if not questions:
        raise ValueError("`questions` is empty, so there is nothing to score: pass at least one Question.")
    for question in questions:
        if len(question.options) > len(ascii_uppercase):
            raise ValueError(f"Question {question.text!r} has {len(question.options)} options: letters end at 26.")
    pairs = [
        (letter_prompt(question), f" {letter}")
        for question in questions
        for letter in ascii_uppercase[: len(question.options)]
    ]
    most = max(len(question.options) for question in questions)
    found = iter(
        log_likelihoods(
            model,
            processing_class,
            pairs,
            batch_size=most * batch_size,
            description="Letter choice",
            over_ranks=over_ranks,
        )
    )
    return [
        question.options[likeliest([next(found) for _ in question.options])] == question.answer
        for question in questions
    ]
