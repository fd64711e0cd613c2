"""Multiple choice: options ranked by log-likelihood, by length, by PMI and by letter."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import Question
from ..data.tokens import text_tokenizer
from .fluency import as_prompt
from .likelihood import Sharing, log_likelihoods


PROMPT = "Question: {question}\nAnswer:"
BARE_PROMPT = "Answer:"
# What stands for `BARE_PROMPT` where options answer a turn of chat: a turn in which nothing was asked. SmolLM2-135M
# finds .66 of the capitals by PMI so, and .56 where options are discounted by their likelihood after "Answer:".
BARE_TURN = ""
_OPTIONS = 4


@dataclass(frozen=True)
class ChoiceScores:
    """What each question was answered, in the order of the questions.

    Attributes:
        log_likelihood (`list[bool]`): Whether the most likely option is the right one.
        normalized (`list[bool]`): The same by log-likelihood per character (the harness's `acc_norm`).
        pmi (`list[bool]`): Whether the option of highest PMI is the right one.
        removed (`list[bool]`): Whether the option that is likeliest after the bare prompt is the right one. A bank on
            which this is far from chance can be answered without its questions.
        scores (`list[list[float]]`): Log-likelihood of each option, in nats.
        bare (`list[list[float]]`): Log-likelihood of each option after the bare prompt, in nats.
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
    sharing: Sharing | None = None,
) -> ChoiceScores:
    """Answer multiple-choice questions by ranking the options.

    An option's log-likelihood is the sum of its tokens' log-probabilities after the prompt, which has the question's
    own form. Its PMI is that minus the same sum after a bare `"Answer:"`, which removes the preference for frequent
    strings (for a turn of chat: after one in which nothing was asked). What several questions have in common, such as
    options after the bare prompt, is scored once.

    Args:
        model: Model; put in evaluation mode for the call, then back.
        questions: Questions, each with its options; the first option need not be the right one.
        batch_size: Questions per forward pass.
        prompt: What stands before an option of a question in the form `"question"`.
        description: Label of the progress bar.
        over_ranks: Whether the processes of a launch share the work; then all of them must call this.
        sharing: See [`log_likelihoods`].

    Returns:
        [`ChoiceScores`]: one verdict per question and rule.

    Raises:
        ValueError: if there are no questions.
    """
    if not questions:
        raise ValueError("`questions` is empty, so there is nothing to score: pass at least one Question.")
    parts = _parts(processing_class, questions, prompt)
    asked = [[(before, option) for option in options] for before, _, options in parts]
    alone = [[(bare, option) for option in options] for _, bare, options in parts]
    pairs = list(dict.fromkeys(pair for rows in (alone, asked) for row in rows for pair in row))
    found = log_likelihoods(
        model,
        processing_class,
        pairs,
        batch_size=_OPTIONS * batch_size,
        description=description,
        over_ranks=over_ranks,
        sharing=sharing,
    )
    likelihoods = dict(zip(pairs, found, strict=True))
    scores, bare = ([[likelihoods[pair] for pair in row] for row in rows] for rows in (asked, alone))
    lengths = [[len(option) for option in question.options] for question in questions]
    return ChoiceScores(
        log_likelihood=_verdicts(questions, scores),
        normalized=_verdicts(
            questions, [[s / n for s, n in zip(*both, strict=True)] for both in zip(scores, lengths, strict=True)]
        ),
        pmi=_verdicts(questions, [pmi(*both) for both in zip(scores, bare, strict=True)]),
        removed=_verdicts(questions, bare),
        scores=scores,
        bare=bare,
    )


def _parts(
    processing_class: PreTrainedTokenizerBase, questions: Sequence[Question], prompt: str
) -> list[tuple[str, str, list[str]]]:
    """Of each question the prompt, the bare prompt, and the options with the space before them."""
    has_turns = text_tokenizer(processing_class).chat_template is not None
    parts = []
    for question in questions:
        if question.form == "chat" and has_turns:
            prompts = as_prompt(processing_class, question.text), as_prompt(processing_class, BARE_TURN)
            parts.append((*prompts, list(question.options)))
        else:
            before = question.text if question.form == "text" else prompt.format(question=question.text)
            parts.append((before, BARE_PROMPT, [f" {option}" for option in question.options]))
    return parts


def pmi(scores: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Pointwise mutual information of a question with each of its options, in nats.

    Args:
        scores: Log-likelihood of each option after the question.
        bare: Log-likelihood of each option after the bare prompt.
    """
    return [score - alone for score, alone in zip(scores, bare, strict=True)]


def likeliest(values: Sequence[float]) -> int:
    """Index of the largest value; the first of equals, as in the harness."""
    return max(range(len(values)), key=values.__getitem__)


def _verdicts(questions: Sequence[Question], values: Sequence[Sequence[float]]) -> list[bool]:
    return [
        question.options[likeliest(row)] == question.answer for question, row in zip(questions, values, strict=True)
    ]


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
        model: Model; put in evaluation mode for the call, then back.
        questions: Questions, at most 26 options each.
        batch_size: Questions per forward pass.
        over_ranks: Whether the processes of a launch share the work; then all of them must call this.

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
