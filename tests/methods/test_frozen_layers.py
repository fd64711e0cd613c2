"""Below the first adapted layer nothing is trained, so that no graph is to be kept there."""

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from .methods import METHODS


@pytest.fixture
def deep(tokenizer):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))


@pytest.fixture
def make(deep, tokenizer, dataset, settings):
    """Makes a trainer of a method whose adapter is in the last two of four layers."""

    def make(name, **fields):
        method = METHODS[name]
        own = dict(method.fields) | ({"layer": 3} if name == "rmu" else {})
        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3])
        args = settings(method.config, max_steps=1, **own, **fields)
        return method.trainer(deep, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)

    return make


@pytest.mark.parametrize("name", METHODS)
def test_layers_below_the_first_adapted_one_keep_no_graph(name, deep, make):
    trainer = make(name)
    seen: dict[int, list[bool]] = {index: [] for index in range(4)}
    for index, layer in enumerate(deep.model.layers):
        layer.register_forward_hook(
            lambda _, args, output, index=index: (
                seen[index].append(output.requires_grad) if torch.is_grad_enabled() else None
            )
        )
    trainer.train()
    assert all(seen[index] and not any(seen[index]) for index in (0, 1))
    assert all(seen[index] and all(seen[index]) for index in (2, 3))


@pytest.mark.parametrize("name", METHODS)
def test_with_checkpointing_the_backward_ends_at_the_first_adapted_layer(name, deep, make):
    trainer = make(name, gradient_checkpointing=True)
    reached: list[int] = []

    def watch(index, output):
        if output.requires_grad:
            output.register_hook(lambda _: reached.append(index))

    for index, layer in enumerate(deep.model.layers):
        layer.register_forward_hook(lambda _, args, output, index=index: watch(index, output))
    trainer.train()
    assert not {0, 1} & set(reached) and {2, 3} <= set(reached)
