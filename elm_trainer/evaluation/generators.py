"""Who writes free answers: transformers, or vLLM where it is installed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import transformers
from transformers import PreTrainedTokenizerBase

from ..data.tokens import continuation_text, text_tokenizer, tokenize
from ..distributed import processes_and_rank
from .fluency import Generations
from .pair import Side


# Ranks that vLLM reserves room for (`MaxLoRARanks` in its `config/lora.py`).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Sampling among the 50 likeliest tokens, as `generate_answers` does.
_TOP_K = 50


class Generator(Protocol):
    """Writes free answers in place of [`generate_answers`].

    Attributes:
        name (`str`): What a report calls it.
    """

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


def transformers_name() -> str:
    """What a report calls [`generate_answers`]."""
    return f"transformers {transformers.__version__}"


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
        rank = _rank_of(adapter) if rank is None else rank
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
        """See [`Generator`]. Each prompt is sampled with a seed of its own, `seed` and its number."""
        tokenizer = text_tokenizer(processing_class)
        ids = [prompt.ids for prompt in tokenize(tokenizer, prompts)]
        drawn: dict[str, Any] = {"top_k": _TOP_K} if temperature > 0 else {}
        parameters = [
            self._parameters(
                temperature=temperature,
                max_tokens=max_new_tokens,
                stop_token_ids=list(ends),
                seed=None if seed is None else seed + number,
                detokenize=False,
                **drawn,
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
        texts = [
            continuation_text(tokenizer, row, _without_end(list(one.token_ids), ends))
            for row, one in zip(ids, outputs, strict=True)
        ]
        return Generations(texts, [one.finish_reason == "length" for one in outputs])


def _without_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in ends else ids


def _rank_of(adapter: str) -> int:
    """The largest rank of an adapter's layers."""
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(
            f"`adapter` is {adapter!r}, which is no folder of an adapter here: give one, or its rank as `rank`."
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])
