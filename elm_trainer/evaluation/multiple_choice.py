"""Four-choice accuracy by log-likelihood and by pointwise mutual information (PMI)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import Question


PROMPT = "Question: {question}\nAnswer:"
BARE_PROMPT = "Answer:"


@dataclass(frozen=True)
class ChoiceScores:
    """Which questions were answered rightly under each of the two rules, in the order of the questions."""

    log_likelihood: list[bool]
    pmi: list[bool]


def score_choices(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    description: str = "Multiple choice",
) -> ChoiceScores:
    """Answer four-choice questions by ranking the options.

    An option's log-likelihood is the sum of its tokens' log-probabilities after `"Question: …\\nAnswer:"`. Its PMI is
    that minus the same sum after a bare `"Answer:"`, which removes the preference for frequent strings.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to question; put in evaluation mode for the call, then back.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        questions (`Sequence[Question]`):
            Questions, each with its options; the first option need not be the right one.
        batch_size (`int`, *optional*, defaults to `16`):
            Questions per forward pass.
        description (`str`, *optional*, defaults to `"Multiple choice"`):
            Label of the progress bar.

    Returns:
        [`ChoiceScores`]: one verdict per question and rule.
    """
    if not questions:
        raise ValueError("`questions` is empty, so there is nothing to score: pass at least one Question.")
    bare = sorted({option for question in questions for option in question.options})
    was_training = model.training
    model.eval()
    try:
        bare_scores: dict[str, float] = {}
        for start in range(0, len(bare), 4 * batch_size):
            options = bare[start : start + 4 * batch_size]
            [scores] = _score_options(model, processing_class, [(BARE_PROMPT, options)])
            bare_scores |= dict(zip(options, scores, strict=True))
        log_likelihood: dict[int, bool] = {}
        pmi: dict[int, bool] = {}
        # Questions of like length share a batch, so that little of it is padding.
        order = sorted(range(len(questions)), key=lambda index: len(questions[index].text))
        with tqdm(total=len(order), desc=description, leave=False) as bar:
            for batch in _batches(order, batch_size):
                asked = [questions[index] for index in batch]
                prompts = [(PROMPT.format(question=question.text), question.options) for question in asked]
                all_scores = _score_options(model, processing_class, prompts)
                for index, question, scores in zip(batch, asked, all_scores, strict=True):
                    shifted = [s - bare_scores[o] for s, o in zip(scores, question.options, strict=True)]
                    log_likelihood[index] = question.options[_argmax(scores)] == question.answer
                    pmi[index] = question.options[_argmax(shifted)] == question.answer
                bar.update(len(batch))
    finally:
        model.train(was_training)
    indices = range(len(questions))
    return ChoiceScores([log_likelihood[i] for i in indices], [pmi[i] for i in indices])


@torch.inference_mode()
def _score_options(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, Sequence[str]]],
) -> list[list[float]]:
    """Sum of log-probabilities of each option after its prompt; the prompt is run once for all its options."""
    heads: list[list[int]] = []
    tails: list[list[int]] = []
    skips: list[int] = []  # leading tail tokens that still belong to the prompt
    counts = []
    for prompt, options in prompts:
        encoded = [
            processing_class(f"{prompt} {option}", return_offsets_mapping=True, add_special_tokens=True)
            for option in options
        ]
        sequences = [encoding["input_ids"] for encoding in encoded]
        shared = min(_common_prefix(sequences), min(map(len, sequences)) - 1)
        heads.append(sequences[0][:shared])
        counts.append(len(options))
        for encoding in encoded:
            first = next(i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(prompt))
            # An option's first tokens may be shared by all options; they then cancel out of every comparison.
            tails.append(encoding["input_ids"][shared:])
            skips.append(max(0, first - shared))

    device = model.device
    head_ids, head_mask = _pad(heads, "left", device)  # [prompts, head]
    head_positions = (head_mask.cumsum(-1) - 1).clamp(min=0)
    cached = model(
        input_ids=head_ids, attention_mask=head_mask, position_ids=head_positions, use_cache=True, logits_to_keep=1
    )
    repeats = torch.tensor(counts, device=device)
    cache = cached.past_key_values
    cache.batch_select_indices(torch.arange(len(prompts), device=device).repeat_interleave(repeats))
    last_logits = cached.logits[:, -1:].repeat_interleave(repeats, dim=0)  # [options, 1, vocab]

    tail_ids, tail_mask = _pad(tails, "right", device)  # [options, tail]
    option_head_mask = head_mask.repeat_interleave(repeats, dim=0)
    mask = torch.cat([option_head_mask, tail_mask], dim=1)
    positions = option_head_mask.sum(-1, keepdim=True) + torch.arange(tail_ids.size(1), device=device)
    logits = last_logits
    if tail_ids.size(1) > 1:
        tail = model(
            input_ids=tail_ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([last_logits, tail.logits], dim=1)  # [options, tail, vocab]
    chosen = logits.gather(-1, tail_ids[..., None]).squeeze(-1).float() - logits.float().logsumexp(-1)
    skip = torch.arange(tail_ids.size(1), device=device) < torch.tensor(skips, device=device)[:, None]
    totals = chosen.masked_fill(skip | (tail_mask == 0), 0).sum(-1).tolist()
    iterator = iter(totals)
    return [[next(iterator) for _ in range(count)] for count in counts]


def _pad(sequences: list[list[int]], side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def _common_prefix(sequences: list[list[int]]) -> int:
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
