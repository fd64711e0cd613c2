"""Round the weights to 8 or 4 bits: knowledge that was only dimmed may come back."""

import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from .base import Attack, AttackResult, AttackTarget


# Weights that share one scale in the 4-bit format.
BLOCK = 64


@dataclass
class QuantizationAttack(Attack):
    r"""
    Quantise the erased model (an adapter merged) with bitsandbytes, which runs on CPUs too, and ask again.

    Parameters:
        bits (`list[int]`, *optional*, defaults to `[8, 4]`): 8 for LLM.int8(), 4 for NF4.
    """

    name = "quantization"
    bits: list[int] = field(default_factory=lambda: [8, 4])

    def __post_init__(self):
        if not self.bits or set(self.bits) - {4, 8}:
            raise ValueError(f"`bits` holds {self.bits}: use 4 and 8.")

    def run(self, target: AttackTarget) -> list[AttackResult]:
        if find_spec("bitsandbytes") is None:
            raise ImportError(
                "The attack quantization needs bitsandbytes: `pip install elm-trainer[eval]`, or leave the attack out."
            )
        erased = target.pair.erased
        results = []
        with tempfile.TemporaryDirectory() as folder:
            merged = erased if target.pair.adapter is None else copy.deepcopy(target.pair.adapter).merge_and_unload()
            merged.save_pretrained(folder)
            del merged
            for bits in self.bits:
                config = BitsAndBytesConfig(
                    load_in_8bit=bits == 8,
                    load_in_4bit=bits == 4,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_compute_dtype=erased.dtype,
                )
                device_map: dict[str, Any] = {"": erased.device}
                model = AutoModelForCausalLM.from_pretrained(
                    folder, quantization_config=config, dtype=erased.dtype, device_map=device_map
                )
                with _without_cast_notices():
                    results.append(AttackResult(f"{self.name}.{bits}-bit", "pmi", target.rank(model=model)))
                del model  # before the next one is loaded beside it
        return results

    def inapplicable(self, target: AttackTarget) -> str | None:
        erased = target.pair.erased
        if is_quantised(erased):
            return "the erased model is quantised already"
        widths = {
            module.in_features
            for name, module in erased.named_modules()
            if isinstance(module, nn.Linear) and ".lora_" not in name
        }
        if 4 in self.bits and erased.device.type == "cpu" and any(width % BLOCK for width in widths):
            return f"4-bit kernels for CPUs take layers whose width is a multiple of {BLOCK}"
        return None


@contextmanager
def _without_cast_notices() -> Iterator[None]:
    """LLM.int8() computes in float16, and bitsandbytes says so for every layer of every batch."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_quantised(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model's weights are stored in fewer bits than they compute with."""
    return "quantization_config" in model.config.to_dict()
