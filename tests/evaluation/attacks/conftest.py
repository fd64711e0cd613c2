import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from elm_trainer.attacks import built_in_target
from elm_trainer.evaluation.pair import ModelPair


@pytest.fixture
def erased_model(tokenizer):
    """A model whose adapter does something; wide enough for 4-bit kernels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.fixture
def adapter_pair(erased_model):
    return ModelPair(erased_model)


@pytest.fixture
def checkpoint_pair(erased_model):
    """The same erasure as a full checkpoint, with its reference."""
    reference = copy.deepcopy(erased_model).unload()
    return ModelPair(copy.deepcopy(erased_model).merge_and_unload(), reference)


@pytest.fixture(params=["adapter_pair", "checkpoint_pair"])
def any_target(request, tokenizer):
    return built_in_target(request.getfixturevalue(request.param), tokenizer, "capitals", questions=16)


@pytest.fixture
def target(adapter_pair, tokenizer):
    return built_in_target(adapter_pair, tokenizer, "capitals", questions=16)


@pytest.fixture
def checkpoint_target(checkpoint_pair, tokenizer):
    return built_in_target(checkpoint_pair, tokenizer, "capitals", questions=16)
