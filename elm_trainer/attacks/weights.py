"""Attacks on the weights: scale the adapter, remove it from layers, quantize."""

import copy
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ..evaluation.pair import ModelPair
from ..fingerprint import is_quantised
from ..modeling import decoder_layers
from .base import Attack, AttackResult, AttackTarget


# Weights that share one scale in the 4-bit format.
BLOCK = 64


@dataclass
class ScalingAttack(Attack):
    r"""
    Multiply what the erasure changed: the adapter's scale, or for a checkpoint the difference of the weights,
    `θ_reference + factor · (θ_erased − θ_reference)`.

    Parameters:
        factors (`list[float]`, *optional*, defaults to `[0.5, 1.5]`): Factors; `0` is the reference, `1` changes
            nothing.
    """

    name = "scaling"
    factors: list[float] = field(default_factory=lambda: [0.5, 1.5])

    def __post_init__(self):
        if not self.factors:
            raise ValueError("`factors` is empty: give at least one.")

    def run(self, target: AttackTarget) -> list[AttackResult]:
        results = []
        for factor in self.factors:
            with scaled(target.pair, factor):
                results.append(AttackResult(f"{self.name}.{factor:g}", "pmi", target.rank()))
        return results

    def inapplicable(self, target: AttackTarget) -> str | None:
        return why_not_scalable(target.pair)


@dataclass
class LayerRemovalAttack(Attack):
    r"""
    Take the erasure off neighboring layers at a time: their adapters, or for a checkpoint their weights, in whose
    place the reference's are put.

    Parameters:
        width (`int`, *optional*, defaults to `1`): Layers per block.
    """

    name = "layer-removal"
    width: int = 1

    def __post_init__(self):
        self._require_positive("width")

    def run(self, target: AttackTarget) -> list[AttackResult]:
        layers = changed_layers(target.pair)
        results = []
        for start in range(0, len(layers), self.width):
            block = layers[start : start + self.width]
            with scaled(target.pair, 0.0, block):
                span = "-".join(str(index) for index in dict.fromkeys((block[0], block[-1])))
                results.append(AttackResult(f"{self.name}.{span}", "pmi", target.rank()))
        return results

    def inapplicable(self, target: AttackTarget) -> str | None:
        if reason := why_not_scalable(target.pair):
            return reason
        return None if changed_layers(target.pair) else "the erasure changed no decoder layer"


def why_not_scalable(pair: ModelPair) -> str | None:
    """Why [`scaled`] cannot reach what the erasure changed, or `None` where it can."""
    if pair.adapter is not None:
        layers = [module for module in pair.adapter.modules() if isinstance(module, LoraLayer)]
        if not layers or any(any(layer.use_dora.values()) for layer in layers):
            return "only the scale of a plain LoRA adapter can be changed, and the adapter is of another kind"
        return None
    erased, reference = pair.erased, _reference_weights(pair)
    shapes = {name: parameter.shape for name, parameter in erased.named_parameters()}
    if shapes != {name: parameter.shape for name, parameter in reference.items()}:
        return "the weights of the erased model and of its reference differ in names or shapes"
    if not all(parameter.is_floating_point() for parameter in erased.parameters()):
        return "the erased model's weights are quantized"
    return None


@contextmanager
def scaled(pair: ModelPair, factor: float, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Multiply what the erasure changed, in the whole erased model or in some decoder layers; exactly undone after.

    Args:
        pair ([`ModelPair`]): Erased model and reference.
        factor (`float`): The factor; `0` puts the reference back.
        layers (`Sequence[int]`, *optional*): Indices of decoder layers; the whole model by default.
    """
    stack = decoder_layers(pair.erased)
    parts = [pair.erased] if layers is None else [stack[index] for index in layers]
    with ExitStack() as undo:
        if pair.adapter is not None:
            for part in parts:
                undo.enter_context(rescale_adapter_scale(part, factor))
        else:
            chosen = {id(parameter) for part in parts for parameter in part.parameters()}
            reference = _reference_weights(pair)
            for name, parameter in pair.erased.named_parameters():
                if id(parameter) in chosen and not _equal(parameter, reference[name]):
                    erased = parameter.data
                    undo.callback(setattr, parameter, "data", erased)
                    start = reference[name].detach().to(erased.device, torch.float32)
                    parameter.data = torch.lerp(start, erased.float(), factor).to(erased.dtype)
        yield


def changed_layers(pair: ModelPair) -> list[int]:
    """Indices of the decoder layers that carry an adapter, or whose weights are not the reference's."""
    layers = enumerate(decoder_layers(pair.erased))
    if pair.adapter is not None:
        return [i for i, layer in layers if any(isinstance(module, LoraLayer) for module in layer.modules())]
    reference = _reference_weights(pair)
    changed = {
        id(parameter) for name, parameter in pair.erased.named_parameters() if not _equal(parameter, reference[name])
    }
    return [i for i, layer in layers if any(id(parameter) in changed for parameter in layer.parameters())]


def _reference_weights(pair: ModelPair) -> dict[str, nn.Parameter]:
    with pair.use("reference") as reference:
        return dict(reference.named_parameters())


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.detach().cpu(), second.detach().to("cpu", first.dtype))


@dataclass
class QuantizationAttack(Attack):
    r"""
    Quantize the erased model (an adapter merged) with bitsandbytes, which runs on CPUs too, and ask again.

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
                model = AutoModelForCausalLM.from_pretrained(
                    folder, quantization_config=config, dtype=erased.dtype, device_map={"": erased.device}
                )
                with _without_cast_notices():
                    results.append(AttackResult(f"{self.name}.{bits}-bit", "pmi", target.rank(model=model)))
                del model  # before the next one is loaded beside it
        return results

    def inapplicable(self, target: AttackTarget) -> str | None:
        erased = target.pair.erased
        if is_quantised(erased):
            return "the erased model is quantized already"
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
