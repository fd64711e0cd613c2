"""The erasure methods that test_contract.py holds to one contract, and tiny models of several shapes."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import SFTConfig

from elm_trainer.methods.base import ErasureTrainer
from elm_trainer.methods.elm import ElmConfig, ElmTrainer
from elm_trainer.methods.likelihood import (
    GradDiffConfig,
    GradDiffTrainer,
    NpoConfig,
    NpoTrainer,
    SimNpoConfig,
    SimNpoTrainer,
)
from elm_trainer.methods.repnoise import RepNoiseConfig, RepNoiseTrainer
from elm_trainer.methods.rmu import RmuConfig, RmuTrainer
from elm_trainer.methods.whp import WhpConfig, WhpTrainer


class Method(NamedTuple):
    """A method under test.

    Attributes:
        trainer (`type`): Its trainer.
        config (`type`): Its config.
        terms (`tuple[str, ...]`): The terms it logs.
        fields (`Mapping[str, Any]`): Settings it needs on a model of two layers.
        per_text (`Mapping[str, Any]`): Settings under which its loss is a mean over texts.
    """

    trainer: type[ErasureTrainer]
    config: type[SFTConfig]
    terms: tuple[str, ...]
    fields: Mapping[str, Any] = {}
    per_text: Mapping[str, Any] = {}


ANCHORS = [str(Path(__file__).parent / "anchors" / f"{concept}.yaml") for concept in ("capitals", "bio", "cyber")]
METHODS = {
    "elm": Method(ElmTrainer, ElmConfig, ("erase", "retain", "consistency"), {"eta": 3.0}),
    "graddiff": Method(GradDiffTrainer, GradDiffConfig, ("erase", "retain"), {"retain_loss": "kl"}),
    "npo": Method(NpoTrainer, NpoConfig, ("erase", "retain")),
    "repnoise": Method(
        RepNoiseTrainer, RepNoiseConfig, ("retain", "noise", "ascent"), {}, {"alpha": 0.0, "beta": 0.0}
    ),
    "rmu": Method(RmuTrainer, RmuConfig, ("erase", "retain"), {"layer": 1}),
    "simnpo": Method(SimNpoTrainer, SimNpoConfig, ("erase", "retain"), {"delta": 10.0}),
    "whp": Method(
        WhpTrainer, WhpConfig, ("erase", "retain"), {"anchors": ANCHORS, "reinforced_steps": 2, "retain_weight": 1.0}
    ),
}

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SHAPES = {
    "llama": (LlamaForCausalLM, LlamaConfig, SMALL | {"num_key_value_heads": 2}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SMALL | {"num_key_value_heads": 2}),
    "gemma": (GemmaForCausalLM, GemmaConfig, SMALL | {"num_key_value_heads": 1, "head_dim": 8}),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, SMALL),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}


def tiny(shape: str, vocabulary: int) -> PreTrainedModel:
    """A model of two layers, always with the same weights."""
    torch.manual_seed(0)
    model_class, config_class, sizes = SHAPES[shape]
    return model_class(config_class(vocab_size=vocabulary, **sizes))


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the parameters that are trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def leave_launch() -> None:
    """End a process of a launch whose work is done and written; return in any other.

    Threads that libraries leave behind now and then abort a process that ends in the ordinary way ("terminate called without an
    active exception"), also one that has left its group.
    """
    if not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
