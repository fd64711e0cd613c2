import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elm_trainer import ModelPair


IDS = torch.tensor([[5, 9, 200, 31]])


def logits(pair, side):
    with pair.use(side) as model, torch.no_grad():
        return model(IDS).logits


def test_the_reference_of_an_adapter_is_its_base(tiny_model, tiny_peft_model):
    with torch.no_grad():
        next(p for n, p in tiny_peft_model.named_parameters() if "lora_B" in n).normal_()
    pair = ModelPair(tiny_peft_model)
    erased = logits(pair, "erased")
    assert not torch.equal(logits(pair, "reference"), erased)
    assert torch.equal(logits(pair, "erased"), erased)
    assert torch.equal(logits(pair, "reference"), tiny_peft_model.unload()(IDS).logits)


def test_two_full_models_make_a_pair(tiny_model):
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    pair = ModelPair(other, tiny_model)
    assert pair.adapter is None
    assert torch.equal(logits(pair, "reference"), tiny_model(IDS).logits)
    assert torch.equal(logits(pair, "erased"), other(IDS).logits)


@pytest.mark.parametrize("side", ["reference", "erased"])
def test_a_model_is_evaluated_without_dropout_and_handed_back_training(side, tiny_peft_model):
    tiny_peft_model.train()
    with ModelPair(tiny_peft_model).use(side) as model:
        assert not model.training
    assert tiny_peft_model.training


def test_a_full_model_needs_its_reference(tiny_model):
    with pytest.raises(ValueError, match="`reference` is None and the erased model is a LlamaForCausalLM"):
        ModelPair(tiny_model)


def test_a_reference_of_another_vocabulary_is_refused(tiny_model):
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    other = LlamaForCausalLM(LlamaConfig(vocab_size=17, **sizes))
    with pytest.raises(ValueError, match="vocabulary of 17 tokens and the erased model one of 49152"):
        ModelPair(tiny_model, other)
