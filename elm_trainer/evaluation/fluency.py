"""Free answers: who writes them (transformers, or vLLM where it is installed), how often they repeat, and their language."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.packing import obeys_masks
from ..data.tokens import common_prefix, continuation_text, text_tokenizer, tokenize
from ..distributed import processes_and_rank
from ..modeling import evaluating
from .pair import Side, run_batches


# A separate forward pass for fewer tokens costs more than it saves.
_LEAST_SHARED = 4
# The default of transformers: sampling among the 50 likeliest tokens.
_TOP_K = 50
# Ranks that vLLM reserves room for (`MaxLoRARanks` in its `config/lora.py`).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Odds of the likeliest language over the second below which a text is undecided.
_LEAST_ODDS = 4.0
# A name or two, which belong to no language.
_LEAST_LETTERS = 12


@dataclass(frozen=True)
class Generations:
    """Continuations in the order of their prompts, without special tokens, and whether each was cut off at the longest length."""

    texts: list[str]
    truncated: list[bool]


def as_prompt(processing_class: PreTrainedTokenizerBase, question: str) -> str:
    """The question as a chat turn where the tokenizer has a chat template, else as `"Question: …\\nAnswer:"`."""
    tokenizer = text_tokenizer(processing_class)
    if tokenizer.chat_template is None:
        return f"Question: {question}\nAnswer:"
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def end_tokens(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token and those of the model's own settings, such as the end of a chat turn."""
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (processing_class.eos_token_id, *more) if token is not None})


def generation_inputs(
    model: PreTrainedModel | PeftModel, rows: Sequence[list[int]], pad_token_id: int, new_tokens: int
) -> dict[str, Any]:
    """What `generate` takes for prompts of which at most `new_tokens` are generated: ids and mask `[rows, width]`, maybe a cache.

    The tokens that all of them begin with are run once, and their keys and values repeated for every row. Padding then
    stands behind them, `[shared, padding, rest]`, masked and without a position; otherwise on the left.
    """
    width = max(len(row) for row in rows)
    # What the first and the last in order have in common, all between them have; each keeps one token or more.
    shared = min(common_prefix(min(rows), max(rows)), min(map(len, rows)) - 1) if len(rows) > 1 else 0
    if shared < _LEAST_SHARED or not obeys_masks(model, width + new_tokens):
        shared = 0
    input_ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        rest = width - len(row) + shared
        input_ids[index, :shared], input_ids[index, rest:] = torch.tensor(row[:shared]), torch.tensor(row[shared:])
        mask[index, :shared] = mask[index, rest:] = 1
    inputs: dict[str, Any] = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}
    if shared:
        cache = model(input_ids=inputs["input_ids"][:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
        inputs["past_key_values"] = cache
    return inputs


@torch.no_grad()
def read_prompts(
    model: PreTrainedModel | PeftModel, rows: Sequence[list[int]], new_tokens: int
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Run a batch of prompts, those that are there several times once, and what all of them begin with once.

    Returns:
        `tuple[torch.Tensor, Cache, torch.Tensor]`: the logits behind each prompt, `[rows, vocab]`, the cache, and its mask, `[rows,
        width]`, whose sum is the position of the next token.
    """
    distinct = sorted(set(map(tuple, rows)))
    inputs = generation_inputs(model, [list(row) for row in distinct], 0, new_tokens)
    mask, cache = inputs["attention_mask"], inputs.get("past_key_values")
    shared = cache.get_seq_length() if cache is not None else 0
    output = model(
        input_ids=inputs["input_ids"][:, shared:],
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, shared:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    places = {row: place for place, row in enumerate(distinct)}
    whose = torch.tensor([places[tuple(row)] for row in rows], device=model.device)
    output.past_key_values.batch_select_indices(whose)
    return output.logits[whose, -1], output.past_key_values, mask[whose]


@contextmanager
def generating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """While this holds, `generate` uses the settings it is given alone, none of the model's own (penalties, beams, a minimum
    length, a cache), and works under FSDP, whose weights outside the layers only `forward` would gather.

    What the head reads is made contiguous: torch would multiply a slice of the states row by row with a head that needs
    no gradient, and copy its weights for every row.
    """
    head = model.get_output_embeddings()
    # PEFT keeps the settings beside the base's, and hands them over.
    parts = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    owned = [(part, part.generation_config) for part in parts if "generation_config" in vars(part)]
    for part, _ in owned:
        part.generation_config = GenerationConfig()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    sharded = isinstance(model, FSDPModule)
    if sharded:
        register_fsdp_forward_method(model, "generate")
    try:
        yield
    finally:
        for part, settings in owned:
            part.generation_config = settings
        handle.remove()
        if sharded:
            del model.generate  # the instance's; the method of the class is left


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
        max_new_tokens: Longest continuation, in tokens.
        temperature: Of sampling among the 50 likeliest tokens; `0` is greedy.
        seed: Of sampling, for the same continuations of the same prompts at the same batch size, whatever the number
            of processes: batch `i` is drawn with `seed + i`. torch's global random state is then left as it was.
            Without a seed, that state is drawn from.
        over_ranks: See [`run_batches`].

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
        top_k=_TOP_K if temperature else None,
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
        truncated = ~torch.isin(tokens, torch.tensor(ends, device=device)).any(-1)
        rows = zip(batch, tokens.tolist(), truncated.tolist(), strict=True)
        return [(continuation_text(processing_class, ids[index], new), cut) for index, new, cut in rows]

    with evaluating(model), generating(model):
        found = run_batches(run, batches, model, over_ranks=over_ranks)
    answers = [pair for _, pair in sorted(zip(order, chain(*found), strict=True))]
    return Generations([text for text, _ in answers], [truncated for _, truncated in answers])


class Generator(Protocol):
    """Writes free answers in place of [`generate_answers`]; a report calls it by its `name`."""

    name: str

    def __call__(
        self,
        side: Side,
        processing_class: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int | None,
        ends: Sequence[int],
    ) -> Generations:
        """The answers of a side's model to prompts in their final form; an answer ends with one of the tokens `ends`."""


class VllmGenerator:
    """Free answers by vLLM: the reference is its model, and the erased one the same with the adapter as a `LoRARequest`.

    It holds weights of its own beside those that are measured. Answers are those of the same weights, but not of the same
    arithmetic: where two tokens are nearly as likely, they may differ from those of transformers.

    Args:
        model (`str`): Base of the adapter, as vLLM takes it: a folder, or an id on the Hub.
        adapter (`str`): LoRA adapter: a folder, or an id on the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of the weights.
        tensor_parallel_size (`int`, *optional*, defaults to `1`): GPUs that share the weights.
        gpu_memory_utilization (`float`, *optional*, defaults to `0.4`): Share of a GPU's memory that vLLM takes; what is
            measured otherwise needs the rest.
        rank (`int`, *optional*): Rank of the adapter; read from its `adapter_config.json` where it is a folder, and needed
            where it is on the Hub.

    Raises:
        ImportError: where vLLM is not installed.
        ValueError: in a launch of several processes, or for a rank above 512.
    """

    def __init__(
        self,
        model: str,
        adapter: str,
        *,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.4,
        rank: int | None = None,
    ):
        if (ranks := processes_and_rank()[0]) > 1:
            raise ValueError(
                f"`generator` is vLLM in a launch of {ranks} processes: start one, and let vLLM divide the weights by "
                "`tensor_parallel_size`."
            )
        if rank is None:
            path = Path(adapter) / "adapter_config.json"
            if not path.is_file():
                raise ValueError(
                    f"`adapter` is {adapter!r}, which is no folder of an adapter here: give one, or its rank as `rank`."
                )
            config = json.loads(path.read_text(encoding="utf-8"))
            rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        room = next((most for most in _VLLM_RANKS if most >= rank), None)
        if room is None:
            raise ValueError(
                f"`adapter` {adapter!r} has the rank {rank}, and vLLM serves up to {_VLLM_RANKS[-1]}: use `elm shrink`, or "
                "transformers."
            )
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ImportError(
                f"vLLM cannot be imported ({error}): `pip install vllm`, or use transformers."
            ) from error
        self.name = f"vllm {vllm.__version__}"
        self._parameters = vllm.SamplingParams
        self._adapter = LoRARequest("erased", 1, adapter)
        self._model = vllm.LLM(
            model=model,
            dtype=dtype,
            seed=0,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=room,
        )

    def __call__(
        self,
        side: Side,
        processing_class: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int | None,
        ends: Sequence[int],
    ) -> Generations:
        """The answers of a side's model to prompts in their final form; an answer ends with one of the tokens `ends`.

        Each prompt is sampled with a seed of its own, `seed` and its number.
        """
        tokenizer = text_tokenizer(processing_class)
        ids = [prompt.ids for prompt in tokenize(tokenizer, prompts)]
        parameters = [
            self._parameters(
                temperature=temperature,
                top_k=_TOP_K if temperature > 0 else 0,  # 0: all tokens
                max_tokens=max_new_tokens,
                stop_token_ids=list(ends),
                seed=None if seed is None else seed + number,
                detokenize=False,
            )
            for number in range(len(ids))
        ]
        # Tokens, so that vLLM reads what the other measures read.
        written = self._model.generate(
            [{"prompt_token_ids": row} for row in ids],
            parameters,
            use_tqdm=False,
            lora_request=self._adapter if side == "erased" else None,
        )
        outputs = [one.outputs[0] for one in written]
        texts = []
        for row, one in zip(ids, outputs, strict=True):
            tokens = list(one.token_ids)
            if tokens and tokens[-1] in ends:
                tokens.pop()
            texts.append(continuation_text(tokenizer, row, tokens))
        return Generations(texts, [one.finish_reason == "length" for one in outputs])


def repetition(text: str) -> float:
    """Share of a text's word 3-grams that occurred in it before; 0 for a text shorter than three words."""
    return 1 - distinct_n([text], 3) if len(text.split()) >= 3 else 0.0


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of distinct word n-grams over all texts."""
    grams = [gram for text in texts for gram in zip(*(text.split()[offset:] for offset in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


@cache
def _identifier() -> LanguageIdentifier:
    """The model of langid.py, which comes with the package `py3langid`; about a second to load."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str) -> str | None:
    """ISO 639 code of a text's language by its byte n-grams, or `None` for a text too short or too ambiguous to tell.

    Babble may come out as some language, as undecided, or as `"zxx"`, which means no language.
    """
    # In other scripts a few letters say as much as a word here, and the script itself tells.
    if text.isascii() and sum(character.isalpha() for character in text) < _LEAST_LETTERS:
        return None
    (language, first), (_, second), *_ = _identifier().rank(text)
    return language if first >= _LEAST_ODDS * second else None


def language_kept(prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
    """Whether each answer is in the language of its prompt, which has no chat template; `None` where either's language
    is undecided, as of empty answers, names and single words: count these apart, neither as kept nor as lost.
    """
    asked = {prompt: language_of(prompt) for prompt in set(prompts)}
    languages = [(asked[prompt], language_of(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    return [None if None in both else both[0] == both[1] for both in languages]
