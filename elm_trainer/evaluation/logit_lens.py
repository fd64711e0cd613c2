"""Logit lens: what the model's own head reads in every layer at the moment it has to answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import Question
from ..data.tokens import text_ids, tokenize_pairs
from .activations import final_norm, hidden_states
from .multiple_choice import PROMPT, likeliest
from .statistics import Figure, bootstrap_ratio


@dataclass(frozen=True)
class LensScores:
    """What each layer would answer.

    Attributes:
        accuracy (`list[Figure]`): Share of questions whose right option ranks first, per layer, the embeddings first;
            the interval is over resampled subjects, and their number is its `n`.
        logits (`list[list[list[float]]]`): Logit of each option's first token, by layer and kept question.
        questions (`list[int]`): Indices of the questions that were kept.
        chance (`float`): Accuracy of a guess among the options.
    """

    accuracy: list[Figure]
    logits: list[list[list[float]]]
    questions: list[int]
    chance: float


def logit_lens(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    prompt: str = PROMPT,
    batch_size: int = 16,
    seed: int = 0,
) -> LensScores:
    """Rank the options by their first token, under the final norm and head applied to every layer's hidden state.

    The state is that of the prompt's last token. A question is skipped where two options begin with the same token.
    The logits are those of the head alone: a model's own scaling or capping of them is left out, which changes no
    ranking.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Model, already in evaluation mode.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        questions (`Sequence[Question]`):
            Questions with their options.
        prompt (`str`, *optional*, defaults to `"Question: {question}\\nAnswer:"`):
            What stands before an option.
        batch_size (`int`, *optional*, defaults to `16`):
            Questions per forward pass.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the intervals.

    Returns:
        [`LensScores`]: verdicts of every layer; the last layer's are the model's own.

    Raises:
        ValueError: if no question is left, or the model's final norm or head cannot be found.
    """
    firsts = [_first_tokens(processing_class, prompt, question) for question in questions]
    kept = [index for index, tokens in enumerate(firsts) if tokens]
    if not kept:
        raise ValueError(
            f"None of the {len(questions)} `questions` has options that begin with different tokens: ask questions "
            "whose options differ in their first word."
        )
    prompts = [prompt.format(question=questions[index].text) for index in kept]
    states = torch.cat(hidden_states(model, processing_class, prompts, batch_size=batch_size), dim=1)
    logits = _option_logits(model, states, [firsts[index] for index in kept], batch_size)
    subjects: dict[str, int] = {}
    for index in kept:
        subjects.setdefault(questions[index].subject or questions[index].text, len(subjects))
    groups = torch.tensor([subjects[questions[index].subject or questions[index].text] for index in kept])
    accuracy = []
    for layer in logits:
        best = [questions[index].options[likeliest(scores)] for index, scores in zip(kept, layer, strict=True)]
        right = torch.tensor([option == questions[index].answer for index, option in zip(kept, best, strict=True)])
        # Several phrasings of one fact are no independent questions.
        accuracy.append(
            bootstrap_ratio(groups.bincount(right.double()).tolist(), groups.bincount().tolist(), seed=seed)
        )
    return LensScores(accuracy, logits, kept, sum(1 / len(questions[index].options) for index in kept) / len(kept))


def _first_tokens(processing_class: PreTrainedTokenizerBase, prompt: str, question: Question) -> list[int]:
    """First token of each option after the prompt; none where two are the same, or the prompt's tokens change."""
    head = prompt.format(question=question.text)
    head_ids = text_ids(processing_class, head)
    tokens = []
    for ids, first in tokenize_pairs(processing_class, [(head, f" {option}") for option in question.options]):
        if ids[:first] != head_ids:
            return []
        tokens.append(ids[first])
    return tokens if len(set(tokens)) == len(tokens) else []


@torch.inference_mode()
def _option_logits(
    model: PreTrainedModel | PeftModel, states: torch.Tensor, options: list[list[int]], batch_size: int
) -> list[list[list[float]]]:
    norm, head = final_norm(model), model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: pass a causal language model.")
    scores: list[list[list[float]]] = []
    for layer in states:  # [questions, hidden]
        rows: list[list[float]] = []
        for start in range(0, len(layer), batch_size):
            # Back into the model's own precision, from which the states came.
            batch = layer[start : start + batch_size, None].to(model.device, head.weight.dtype)
            logits = head(norm(batch))[:, 0].float()  # [batch, vocab]
            chosen = zip(logits, options[start : start + batch_size], strict=True)
            rows += [row[torch.tensor(tokens, device=row.device)].tolist() for row, tokens in chosen]
        scores.append(rows)
    return scores
