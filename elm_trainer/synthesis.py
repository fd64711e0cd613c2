"""Guided generation: the fluent completions of the consistency term, and plain samples of the reference."""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .checks import SynthesisConfig, number_range
from .concept import Concept
from .data.facts import own_yaml
from .data.tokens import behind_context, continuation_text, text_ids, text_tokenizer, tokenize
from .evaluation.fluency import generating, read_prompts, repetition
from .files import append_line, json_sha256, read_lines, sealed, settings_of, unsealed, write_text
from .modeling import evaluating
from .objectives import plausible_tokens
from .run_lock import waiting_turn


logger = logging.get_logger(__name__)
_LATER = ("max_new_tokens_from", "prompt_characters", "pivots", "keep_on_topic")  # fields that older caches lack
Rows = list[list[str]]  # of prompt and completion


def pivot_sentences(kind: str) -> tuple[str, ...]:
    """The sentences between prompt and completion of a kind (`data/texts/pivots.yaml`)."""
    return tuple(own_yaml("texts/pivots.yaml")[kind])


@dataclass(frozen=True)
class SynthesisResult:
    """Pairs of prompt and completion, and how many were dropped for which reason."""

    pairs: list[tuple[str, str]]
    dropped: dict[str, int]


def synthesize_completions(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    concept: Concept,
    config: SynthesisConfig | None = None,
    *,
    cache_dir: str | Path | None = None,
    fingerprint: str = "",
) -> SynthesisResult:
    """Write the completions of the consistency term (arXiv 2410.02760): text with which a novice continues.

    Each prompt is followed by a pivot sentence. The next token is drawn from `b + γ·(n − e)`: the reference on the
    prompt alone, behind a novice context, and behind an expert context, each stream with its own KV cache.

    Args:
        model ([`~transformers.PreTrainedModel`]): The reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (`Sequence[str]`): Beginnings of forget texts.
        concept ([`Concept`]): For its contexts, and its keywords, which a completion must not name.
        config ([`SynthesisConfig`], *optional*): Settings.
        cache_dir (`str` or `Path`, *optional*): Where finished batches are kept. A second call with the same prompts,
            concept, settings and `fingerprint` samples nothing; an interrupted one continues with the next batch. Runs
            at the same time take turns.
        fingerprint (`str`, *optional*): What identifies the model, e.g. [`model_fingerprint`].

    Returns:
        [`SynthesisResult`]: the pairs, in which the pivot sentence stands at the head of the completion.

    Raises:
        TypeError: if `prompts` is not a list of texts, or `concept` not a [`Concept`].
        ValueError: if there are no prompts, all are too short, or all completions were dropped.
        OSError: if the cache can't be read or written to.
    """
    config = config or SynthesisConfig()
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError('`prompts` is no list of texts: give `[prompt]`, or `load_texts(path)["text"][:]`.')
    if not prompts:
        raise ValueError("`prompts` is empty: give at least one beginning of a forget text.")
    if not isinstance(concept, Concept):
        raise TypeError(f"`concept` is of type {type(concept).__name__}: give `load_concept(name)` or a `Concept`.")
    if lengths := number_range("prompt_characters", config.prompt_characters):
        prompts = _beginnings(prompts, *lengths, config.seed)
    depends = [list(prompts), asdict(concept), settings_of(config, _LATER), fingerprint]
    key = json_sha256(["completions, version 2", *depends])[:32]
    pivots = pivot_sentences(config.pivots)

    def write(index: int, chunk: list[str]) -> list[str]:
        rng = random.Random(f"{config.seed}-{index}")
        drawn = [rng.choice(pivots) for _ in chunk]
        # Both sides draw alike, since their contexts come in pairs.
        experts, novices = (
            random.Random(f"{config.seed}-{index}-contexts").choices(contexts, k=len(chunk))
            for contexts in (concept.expert_contexts, concept.novice_contexts)
        )
        texts = [text_ids(processing_class, prompt + pivot) for prompt, pivot in zip(chunk, drawn, strict=True)]
        led = [
            [behind_context(processing_class, *both)[0] for both in zip(contexts, texts, strict=True)]
            for contexts in (experts, novices)
        ]
        completions = guided_sample(model, processing_class, [texts, *led], config, seed=config.seed * 100_003 + index)
        return [pivot + completion for pivot, completion in zip(drawn, completions, strict=True)]

    rows = _resumable(prompts, config.batch_size, write, cache_dir, key, "Synthesizing", pivots)
    pairs: list[tuple[str, str]] = []
    dropped = {"empty": 0, "repetition": 0, "on_topic": 0}
    subjects = re.compile("|".join(rf"\b{re.escape(k)}\b" for k in concept.keywords), re.IGNORECASE)
    for prompt, completion in rows:
        pivot = next(p for p in pivots if completion.startswith(p))
        new = completion[len(pivot) :]
        if len(new.split()) < config.min_words:
            dropped["empty"] += 1
        elif repetition(new) > config.max_repetition:
            dropped["repetition"] += 1
        elif subjects.search(new) and not config.keep_on_topic:
            dropped["on_topic"] += 1
        else:
            pairs.append((prompt, completion))
    logger.info(f"Synthesis kept {len(pairs)} of {len(rows)} completions; dropped {dropped}.")
    if not pairs:
        raise ValueError(
            f"All {len(rows)} completions were dropped ({dropped}): lower `gamma` or raise `max_repetition`."
        )
    return SynthesisResult(pairs, dropped)


def _beginnings(texts: Sequence[str], shortest: int, longest: int, seed: int) -> list[str]:
    """Each text up to a length in characters that is drawn for it; those below the shortest are dropped."""
    rng = random.Random(f"{seed}-beginnings")
    long = [text for text in texts if len(text) >= shortest]
    if not long:
        raise ValueError(
            f"`prompt_characters` is '{shortest}-{longest}', and none of the {len(texts)} prompts is that long: lower it."
        )
    if len(long) < len(texts):
        logger.warning(
            f"Dropped {len(texts) - len(long)} of {len(texts)} prompts, of fewer than {shortest} characters."
        )
    return [text[: rng.randint(shortest, min(longest, len(text)))] for text in long]


@torch.inference_mode()
def guided_sample(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    streams: Sequence[Sequence[list[int]]],
    config: SynthesisConfig,
    *,
    seed: int,
) -> list[str]:
    """Sample one batch from `b + γ·(n − e)`, given the token ids of the prompts of the plain, the expert and the novice stream, or of
    the plain stream alone for ordinary sampling. Each kind of device draws other samples.
    """
    count, longest = len(streams[0]), config.max_new_tokens
    lengths = random.Random(f"{seed}-lengths")
    limits = [lengths.randint(config.max_new_tokens_from or longest, longest) for _ in range(count)]
    finished = torch.zeros(count, dtype=torch.bool, device=model.device)
    new: list[torch.Tensor] = []
    eos = text_tokenizer(processing_class).eos_token_id
    with evaluating(model), generating(model):
        logits, cache, mask = read_prompts(model, [row for stream in streams for row in stream], longest)
        positions = mask.sum(-1, keepdim=True) - 1
        generator = torch.Generator(logits.device).manual_seed(seed)
        for _ in range(max(limits)):
            probs = guided_probabilities(logits.view(len(streams), count, -1), config)
            token = torch.multinomial(probs, 1, generator=generator).to(model.device)  # [count, 1]
            if eos is not None:
                token = torch.where(finished[:, None], eos, token)
                finished = finished | (token[:, 0] == eos)
            new.append(token)
            if finished.all() or len(new) == max(limits):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions + 1
            output = model(
                input_ids=token.repeat(len(streams), 1),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = output.past_key_values, output.logits[:, -1]
    return [
        continuation_text(processing_class, prompt, row[:limit])
        for prompt, row, limit in zip(streams[0], torch.cat(new, dim=1).tolist(), limits, strict=True)
    ]


def guided_probabilities(logits: torch.Tensor, config: SynthesisConfig) -> torch.Tensor:
    """`softmax` of `b + γ·(n − e)` over plausible tokens and the `top_k` best of them, `[batch, vocab]`, from the logits of the plain,
    expert and novice stream, `[3, batch, vocab]`, or of the plain stream alone, `[1, batch, vocab]`.
    """
    log_probs = (logits.float() / config.temperature).log_softmax(-1)
    base, novice = log_probs[0], log_probs[-1]
    scores = base if len(log_probs) == 1 else base + config.gamma * (novice - log_probs[1])
    if config.plausibility:
        scores = scores.masked_fill(~plausible_tokens(base, novice, config.plausibility), -torch.inf)
    if config.top_k:
        least = scores.topk(min(config.top_k, scores.size(-1))).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores.softmax(-1)


def sample_texts(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: SynthesisConfig | None = None,
    *,
    cache_dir: str | Path | None = None,
    fingerprint: str = "",
) -> list[str]:
    """The reference's own texts: each prompt with its plain continuation, cached and resumable in the same way."""
    config = config or SynthesisConfig()
    key = json_sha256(["texts", list(prompts), settings_of(config, _LATER), fingerprint])[:32]

    def write(index: int, chunk: list[str]) -> list[str]:
        rows = [text.ids for text in tokenize(processing_class, chunk)]
        return guided_sample(model, processing_class, [rows], config, seed=config.seed * 100_003 + index)

    rows = _resumable(prompts, config.batch_size, write, cache_dir, key, "Sampling")
    return [prompt + text for prompt, text in rows]


def _resumable(
    prompts: Sequence[str],
    batch_size: int,
    write: Callable[[int, list[str]], list[str]],
    cache_dir: str | Path | None,
    key: str,
    what: str,
    begins: tuple[str, ...] = ("",),
) -> Rows:
    """All prompts with what `write` gives for a batch of them, each of which is one line of a cache file, written as soon as it is there.

    Runs that want the same batches, by the `key` of what they depend on, take turns, so that each is written once. A line that is
    damaged, or does not fit its batch, whose texts have one of these beginnings, is written again.
    """
    chunks = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    batches = len(chunks)

    def sample(index: int) -> Rows:
        texts = write(index, chunks[index])
        return [[prompt, text] for prompt, text in zip(chunks[index], texts, strict=True)]

    def fits(index: int, rows: Rows) -> bool:
        return [row[0] for row in rows] == chunks[index] and all(row[1].startswith(begins) for row in rows)

    if cache_dir is None:
        return [row for index in tqdm(range(batches), desc=what) for row in sample(index)]
    complete, partial, lock = (Path(cache_dir) / f"{key}{end}" for end in (".jsonl", ".partial.jsonl", ".lock"))

    def read(path: Path) -> dict[int, Rows]:
        return {index: rows for index, rows in _read(path) if index in range(batches) and fits(index, rows)}

    def line(index: int) -> str:
        return json.dumps(sealed({"batch": index, "rows": done[index]}))

    done = read(complete)
    if len(done) < batches:
        with waiting_turn(lock):
            # Others may have sampled some meanwhile.
            done = read(complete) | read(partial)
            missing = [index for index in range(batches) if index not in done]
            for index in tqdm(missing, desc=what, initial=len(done), total=batches, disable=not missing):
                done[index] = sample(index)
                append_line(partial, line(index))
            write_text(complete, "".join(line(index) + "\n" for index in range(batches)))
            partial.unlink(missing_ok=True)
    return [row for index in range(batches) for row in done[index]]


def _read(path: Path) -> Iterator[tuple[int, Rows]]:
    """The undamaged batches in a file, by number."""
    for number, value in read_lines(path, "cache"):
        if isinstance(value, list) and all(
            isinstance(row, list) and len(row) == 2 and all(isinstance(text, str) for text in row) for row in value
        ):
            # Earlier versions wrote a batch to a line, without a checksum.
            yield number - 1, value
        elif (batch := unsealed(value)) is not None:
            yield batch["batch"], batch["rows"]
        else:
            logger.warning(f"{path}, line {number} is damaged: its batch is sampled again.")
