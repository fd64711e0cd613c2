"""Seamlessness and retention: answers, their perplexity under a judge (R-PPL), repetition, language; perplexity on retain text."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from accelerate.utils import send_to_device
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.collator import ElmDataCollator
from ..data.tokens import continuation_ids, continuation_text, text_tokenizer, tokenize
from ..modeling import evaluating
from ..ops import KeepPositions
from .likelihood import generating, generation_inputs
from .pair import SIDES, ModelPair, run_batches


# Odds of the likeliest language over the second below which a text is undecided.
_LEAST_ODDS = 4.0
# A name or two, which belong to no language.
_LEAST_LETTERS = 12


class LanguageDetector:
    """Tells languages by byte n-grams (langid.py's model, which comes with the package `py3langid`)."""

    def __init__(self):
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def detect(self, text: str) -> str | None:
        """ISO 639 code of a text's language, or `None` for a text too short or too ambiguous to tell.

        Babble may come out as some language, as undecided, or as `"zxx"`, which means no language.
        """
        # In other scripts a few letters say as much as a word here, and the script itself tells.
        if text.isascii() and sum(character.isalpha() for character in text) < _LEAST_LETTERS:
            return None
        (language, first), (_, second), *_ = self._identifier.rank(text)
        return language if first >= _LEAST_ODDS * second else None

    def kept(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        """Whether each answer is in the language of its prompt, which has no chat template; `None` where either's language
        is undecided, as of empty answers, names and single words: count these apart, neither as kept nor as lost.
        """
        asked = {prompt: self.detect(prompt) for prompt in set(prompts)}
        verdicts: list[bool | None] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            expected, found = asked[prompt], self.detect(answer)
            verdicts.append(None if expected is None or found is None else found == expected)
        return verdicts


@dataclass(frozen=True)
class Generations:
    """Continuations in the order of their prompts.

    Attributes:
        texts (`list[str]`): The continuations without special tokens.
        truncated (`list[bool]`): Whether each was cut off at the longest length, before the model ended it.
    """

    texts: list[str]
    truncated: list[bool]


def as_prompt(processing_class: PreTrainedTokenizerBase, question: str) -> str:
    """The question as a chat turn where the tokenizer has a chat template, else as `"Question: …\\nAnswer:"`."""
    tokenizer = text_tokenizer(processing_class)
    if tokenizer.chat_template is None:
        return f"Question: {question}\nAnswer:"
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def generate(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int | None = None,
    batch_size: int = 32,
    over_ranks: bool = False,
) -> list[str]:
    """The texts of [`generate_answers`], which takes the same arguments."""
    return generate_answers(
        model,
        processing_class,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        over_ranks=over_ranks,
    ).texts


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int | None = None,
    batch_size: int = 32,
    over_ranks: bool = False,
) -> Generations:
    """Continue prompts that are already in their final form.

    Of the model's own generation settings only the end tokens are used, not its penalties, beams or lengths.

    Args:
        model: Model; put in evaluation mode for the call, then back.
        max_new_tokens: Longest continuation, in tokens.
        temperature: Of sampling among the 50 likeliest tokens; `0` is greedy.
        seed: Of sampling, for the same continuations of the same prompts at the same batch size, whatever the number
            of processes: batch `i` is drawn with `seed + i`. torch's global random state is then left as it was.
            Without a seed, that state is drawn from.
        over_ranks: Whether the processes of a launch share the work; then all of them must call this.

    Raises:
        ValueError: if processes are to share sampled answers without a seed.
    """
    if over_ranks and temperature > 0 and seed is None:
        raise ValueError(
            "`seed` is None, so that each process would draw its own answers: give one with `over_ranks`."
        )
    processing_class = text_tokenizer(processing_class)
    ends = end_tokens(model, processing_class)
    # Padding is masked, so any token will do where there is no end token either.
    pad = (ends or [0])[0] if processing_class.pad_token_id is None else processing_class.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        # The default of transformers: sampling among the 50 likeliest tokens.
        top_k=50 if temperature else None,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,  # a model that trains with gradient checkpointing has it switched off
    )
    device = model.device
    devices = [device] if device.type == "cuda" else []
    ids = [prompt.ids for prompt in tokenize(processing_class, prompts)]
    # Prompts that begin alike share a batch. What is sampled depends on the batch, which is then left as it came.
    order = sorted(range(len(ids)), key=ids.__getitem__) if temperature == 0 else list(range(len(ids)))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def run(batch: list[int]) -> list[tuple[str, bool]]:
        with nullcontext() if seed is None else torch.random.fork_rng(devices=devices):
            if seed is not None:
                torch.manual_seed(seed + batch[0] // batch_size)
            inputs = generation_inputs(model, [ids[index] for index in batch], pad, max_new_tokens)
            tokens = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].size(1) :]
        # [batch, new tokens]; behind its end token a row holds padding.
        ended = torch.isin(tokens, torch.tensor(ends, device=device)).any(-1).tolist()
        texts = [
            continuation_text(processing_class, ids[index], new)
            for index, new in zip(batch, tokens.tolist(), strict=True)
        ]
        return list(zip(texts, (not end for end in ended), strict=True))

    with evaluating(model), generating(model):
        found = run_batches(run, batches, model, over_ranks=over_ranks)
    answers = [pair for _, pair in sorted(zip(order, chain(*found), strict=True))]
    return Generations([text for text, _ in answers], [truncated for _, truncated in answers])


def end_tokens(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token and those of the model's own settings, such as the end of a chat turn."""
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (processing_class.eos_token_id, *more) if token is not None})


def judge_answers(
    judge: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 16,
    over_ranks: bool = False,
) -> tuple[list[float], list[int]]:
    """[`reverse_perplexity`] of answers under any judge, which is asked each question in its own chat template.

    The prompts that a model was given may hold special tokens that mean nothing to another judge, so it reads the bare
    question. The white space between prompt and answer is made what the judge expects there. Perplexities are per token
    of the judge: two models compare under one judge, but a model's values under two judges don't.

    Args:
        processing_class: The judge's own tokenizer.
        questions: Questions, without any template.
        answers: An answer to each.
        over_ranks: Whether the processes of a launch share the work; then all of them must call this.
    """
    prompts = [as_prompt(processing_class, question) for question in questions]
    space = " " if text_tokenizer(processing_class).chat_template is None else ""
    texts = [space + answer.lstrip() if answer.strip() else "" for answer in answers]
    return reverse_perplexity(judge, processing_class, prompts, texts, batch_size=batch_size, over_ranks=over_ranks)


@torch.no_grad()
def reverse_perplexity(
    judge: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 16,
    over_ranks: bool = False,
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood (sum, in nats) and length in tokens of each answer, given its prompt, under a judge.

    An empty answer counts as one end-of-text token. R-PPL is `exp(Σ nlls / Σ tokens)`.

    Args:
        judge: Model that judges; put in evaluation mode for the call, then back.
        processing_class: The judge's own tokenizer.
        prompts: Prompts in the form in which the judge is to read them; see [`judge_answers`].
        answers: An answer to each.
        over_ranks: Whether the processes of a launch share the work; then all of them must call this.
    """
    collator = ElmDataCollator(processing_class)
    tokenizer = collator.processing_class
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for head, answer in zip(tokenize(tokenizer, prompts), answers, strict=True):
        # The judge reads the tokens that were generated after the prompt: tokenized apart, as they were made. An empty
        # answer is judged by the end-of-text token that is all it holds.
        tail = continuation_ids(tokenizer, answer) or end
        rows.append((head.ids + tail, len(head.ids)))

    def run(batch: list[tuple[list[int], int]]) -> list[float]:
        padded = send_to_device(collator.pad(batch), judge.device)
        losses = token_losses(judge, padded)
        return losses.new_zeros(len(batch)).index_add(0, padded["rows"], losses).tolist()

    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    with evaluating(judge):
        found = run_batches(run, batches, judge, over_ranks=over_ranks)
    return list(chain(*found)), [len(ids) - first for ids, first in rows]


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
    return 1 - distinct_n([text], n) if len(text.split()) >= n else 0.0


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of distinct word n-grams over all texts."""
    grams = [gram for text in texts for gram in zip(*(text.split()[offset:] for offset in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Retention:
    """Sums over each text's tokens, in nats: negative log-likelihoods of both models and `KL(reference ‖ adapted)`."""

    reference_nll: list[float]
    adapted_nll: list[float]
    kl: list[float]
    tokens: list[int]


@torch.no_grad()
def retention(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    batch_size: int = 8,
    over_ranks: bool = False,
) -> Retention:
    """Compare the erased model with its reference, token by token, on retain text.

    Args:
        texts: Retain texts that training did not see.
        max_length: Tokens of a text that are read.
        over_ranks: Whether the processes of a launch share the work; then all of them must call this.
    """
    collator = ElmDataCollator(processing_class)

    def run(batch: Sequence[str]) -> list[list[float]]:
        rows = [(text.ids[:max_length], 0) for text in tokenize(processing_class, batch)]
        padded = collator.pad(rows)
        labels = padded["labels"][padded["rows"], padded["columns"] + 1]
        log_probs = {}
        for side in SIDES:
            with pair.use(side) as model:
                logits = position_logits(model, send_to_device(padded, model.device))
            log_probs[side] = logits.float().log_softmax(-1)
        reference = log_probs["reference"]
        adapted = log_probs["erased"].to(reference.device)  # two full models may lie on two devices
        chosen = labels.to(reference.device)[:, None]
        values = (
            -reference.gather(-1, chosen)[:, 0],
            -adapted.gather(-1, chosen)[:, 0],
            (reference.exp() * (reference - adapted)).sum(-1),
        )
        place = padded["rows"].to(reference.device)
        sums = [value.new_zeros(len(rows)).index_add(0, place, value).tolist() for value in values]
        return [*sums, torch.bincount(padded["rows"], minlength=len(rows)).tolist()]

    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    found = run_batches(run, batches, *pair.models, over_ranks=over_ranks)
    columns = [list(chain(*column)) for column in zip(*found, strict=True)] or [[], [], [], []]
    return Retention(columns[0], columns[1], columns[2], [int(count) for count in columns[3]])
