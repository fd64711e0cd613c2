"""Seamlessness: greedy answers, their perplexity under a judge (R-PPL), repetition and emptiness."""

from collections.abc import Sequence

import torch
from accelerate.utils import send_to_device
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.collator import ElmDataCollator
from ..ops import KeepPositions


def as_prompt(processing_class: PreTrainedTokenizerBase, question: str) -> str:
    """The question as a chat turn where the tokenizer has a chat template, else as `"Question: …\\nAnswer:"`."""
    if processing_class.chat_template is None:
        return f"Question: {question}\nAnswer:"
    messages = [{"role": "user", "content": question}]
    return str(processing_class.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> list[str]:
    """Greedy continuations of prompts that are already in their final form; special tokens are left out.

    Args:
        model ([`~transformers.PreTrainedModel`]): Model; put in evaluation mode for the call, then back.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (`Sequence[str]`): Prompts.
        max_new_tokens (`int`, *optional*, defaults to `32`): Longest continuation, in tokens.
        batch_size (`int`, *optional*, defaults to `32`): Prompts per batch.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=processing_class.eos_token_id,
        pad_token_id=processing_class.pad_token_id,
    )
    training = model.training
    model.eval()
    texts: list[str] = []
    try:
        for start in range(0, len(prompts), batch_size):
            batch = processing_class(
                list(prompts[start : start + batch_size]), return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            batch.pop("token_type_ids", None)
            generated = model.generate(**batch, generation_config=config)
            texts += processing_class.batch_decode(
                generated[:, batch["input_ids"].size(1) :], skip_special_tokens=True
            )
    finally:
        model.train(training)
    return texts


@torch.inference_mode()
def reverse_perplexity(
    judge: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 16,
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood (sum, in nats) and length in tokens of each answer, given its prompt, under a judge.

    An empty answer counts as one end-of-text token.
    """
    collator = ElmDataCollator(processing_class)
    nlls: list[float] = []
    tokens: list[int] = []
    for start in range(0, len(prompts), batch_size):
        pairs = zip(prompts[start : start + batch_size], answers[start : start + batch_size], strict=True)
        rows = []
        for prompt, answer in pairs:
            head = processing_class(prompt)["input_ids"]
            # The judge reads the tokens that were generated after the prompt: tokenised apart, as they were made.
            # An empty answer is judged by the end-of-text token that is all it holds.
            tail = processing_class(answer, add_special_tokens=False)["input_ids"] or [processing_class.eos_token_id]
            rows.append((head + tail, len(head)))
        batch = send_to_device(collator.pad(rows), judge.device)
        losses = token_losses(judge, batch)
        sums = losses.new_zeros(len(rows)).index_add(0, batch["rows"], losses)
        nlls += sums.tolist()
        tokens += torch.bincount(batch["rows"], minlength=len(rows)).tolist()
    return nlls, tokens


def token_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Negative log-likelihood of every label of a batch of [`ElmDataCollator`], `[positions]`."""
    logits = position_logits(model, batch)
    labels = batch["labels"][batch["rows"], batch["columns"] + 1]
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def position_logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the positions of a batch that predict a label, `[positions, vocab]`."""
    mask = batch["attention_mask"]
    with KeepPositions(model.get_output_embeddings(), batch["rows"] * mask.size(1) + batch["columns"]):
        return model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).logits[0]


def repetition(text: str, n: int = 3) -> float:
    """Share of a text's word n-grams that occurred in it before; 0 for a text shorter than n words."""
    words = text.split()
    grams = list(zip(*(words[offset:] for offset in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of distinct word n-grams over all texts."""
    grams = [gram for text in texts for gram in zip(*(text.split()[offset:] for offset in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0
