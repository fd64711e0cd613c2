import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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


SHAPE = dict(
    vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, head_dim=8
)


def adapted(layers, kind="llama", **fields):
    """A model with an adapter that changes its logits in the named layers, and numbers of the layers that are run."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"num_key_value_heads": 2, **SHAPE, **fields})
    model = AutoModelForCausalLM.from_config(config)
    ran = []
    for number, layer in enumerate(model.base_model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    targets = [f"layers.{layer}.self_attn.q_proj" for layer in layers]
    model = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    return model, ran


def both_sides(pair, keys=("one",)):
    found = {}
    with pair.sharing_layers():
        for side in ("reference", "erased"):
            for key in keys:
                with pair.use(side) as model, torch.no_grad():
                    found[side, key] = pair.below.run(side, key, lambda: model(IDS, use_cache=False).logits)
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3"])
def test_both_sides_share_the_layers_below_the_first_adapted_one(kind):
    model, ran = adapted([2, 3], kind)
    pair = ModelPair(model)
    found = both_sides(pair, ("one", "two", "three"))
    # The reference runs all; so does the erased model once, to see that it makes no difference.
    assert ran == [0, 1, 2, 3] * 3 + [2, 3] + [0, 1, 2, 3] + [2, 3] * 2
    for key in ("one", "two", "three"):
        assert torch.equal(found["reference", key], logits(pair, "reference"))
        assert torch.equal(found["erased", key], logits(pair, "erased"))
        assert not torch.equal(found["reference", key], found["erased", key])


@pytest.mark.parametrize("layers", [[0], [0, 3]])
def test_nothing_is_shared_where_the_first_layer_is_adapted(layers):
    model, ran = adapted(layers)
    both_sides(ModelPair(model))
    assert ran == [0, 1, 2, 3] * 2


def test_another_forward_is_run_whole_and_nothing_is_kept_where_it_is_not_asked_for():
    model, ran = adapted([3])
    pair = ModelPair(model)
    for order in (("reference", "one"), ("erased", "two")), (("reference", "one"), ("erased", "one")):
        asked = pair.sharing_layers() if ran == [] else nullcontext()
        with asked, torch.no_grad():
            for side, key in order:
                with pair.use(side) as one:
                    pair.below.run(side, key, lambda: one(IDS, use_cache=False).logits)
    assert ran == [0, 1, 2, 3] * 4


def test_no_more_is_kept_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr("elm_trainer.evaluation.pair._LIMIT", IDS.numel() * 16 * 4)
    model, ran = adapted([2])
    both_sides(ModelPair(model), ("one", "two"))
    assert ran == [0, 1, 2, 3] * 2 + [2, 3] + [0, 1, 2, 3] * 2


def test_layers_that_give_something_else_each_time_are_not_shared():
    model, ran = adapted([3])
    calls = iter(range(1, 100))
    model.base_model.model.model.layers[1].register_forward_hook(lambda _, args, output: output * next(calls))
    pair = ModelPair(model)
    both_sides(pair, ("one", "two"))
    assert ran == [0, 1, 2, 3] * 2 + [3] + [0, 1, 2, 3] * 2
