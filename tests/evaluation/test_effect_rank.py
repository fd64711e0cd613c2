import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from elm_trainer.evaluation.hidden_states import (
    effective_rank,
    hidden_effect,
    hidden_states,
    stable_rank,
    weight_effects,
)
from elm_trainer.evaluation.pair import ModelPair

from .test_activations import TEXTS, build_model


def fill(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    ("values", "effective", "stable"),
    [
        ([3.0, 3.0, 3.0, 0.0], 3, 3),
        ([5.0, 0.0], 1, 1),
        # Shares of the squares: 4/5 and 1/5.
        ([2.0, 1.0], math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)), 1.25),
        ([0.0, 0.0], 0, 0),
    ],
)
def test_ranks_of_known_spectra(values, effective, stable):
    assert effective_rank(torch.tensor(values)) == pytest.approx(effective)
    assert stable_rank(torch.tensor(values)) == pytest.approx(stable)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_rslora": True, "lora_alpha": 16}),
        ("gpt2", {"target_modules": ["c_attn"], "rank_pattern": {"h.1.attn.c_attn": 2}, "fan_in_fan_out": True}),
    ],
)
def test_the_spectrum_is_that_of_the_whole_change(architecture, settings, tokenizer):
    base = build_model(architecture, len(tokenizer) if architecture == "gpt2" else 64)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = fill(get_peft_model(base, LoraConfig(r=4, **settings)))

    effects = weight_effects(model)

    merged = model.merge_and_unload().state_dict()
    changes = {name: merged[name] - tensor for name, tensor in before.items() if not torch.equal(merged[name], tensor)}
    # A tied head is the embeddings' own weight.
    changes.pop("lm_head.weight", None)
    assert len(effects) == len(changes) > 1
    for effect in effects:
        ending = f".{effect.module}.weight" if effect.layer is None else f".{effect.layer}.{effect.module}.weight"
        [change] = [change for name, change in changes.items() if name.endswith(ending)]
        expected = torch.linalg.svdvals(change.double())
        rank = len(effect.singular_values)
        assert effect.singular_values == pytest.approx(expected[:rank].tolist(), rel=1e-4, abs=1e-5)
        assert float(expected[rank:].max()) < 1e-4
        assert effect.effective_rank == pytest.approx(effective_rank(expected), rel=1e-4)
        assert effect.stable_rank == pytest.approx(float(change.square().sum() / expected[0] ** 2), rel=1e-4)


def test_active_adapters_add_up(tiny_peft_model):
    tiny_peft_model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    fill(tiny_peft_model)
    tiny_peft_model.base_model.set_adapter(["default", "second"])

    found = {(effect.layer, effect.module): effect for effect in weight_effects(tiny_peft_model)}

    layer = tiny_peft_model.get_base_model().model.layers[1].self_attn.q_proj
    whole = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    expected = torch.linalg.svdvals(whole)[:6].tolist()
    assert found[1, "self_attn.q_proj"].singular_values == pytest.approx(expected, rel=1e-4)
    assert len(found[1, "mlp.up_proj"].singular_values) == 4


def test_an_untrained_adapter_has_no_effect(tiny_peft_model, tokenizer):
    assert all(effect.effective_rank == effect.stable_rank == 0 for effect in weight_effects(tiny_peft_model))
    hidden = hidden_effect(ModelPair(tiny_peft_model), tokenizer, TEXTS)
    assert hidden.effective_rank == [0, 0, 0]
    assert [figure.value for figure in hidden.relative_size] == [0, 0, 0]


def test_dora_is_refused(tiny_model):
    model = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="'default' is no plain LoRA on a matrix at .*q_proj.*merge it"):
        weight_effects(model)


@pytest.mark.parametrize("rank", [1, 3])
def test_embeddings_moved_along_a_few_directions_have_their_rank(rank, tiny_model, tokenizer):
    torch.manual_seed(2)
    erased = copy.deepcopy(tiny_model)
    directions = torch.linalg.qr(torch.randn(32, rank)).Q.T
    with torch.no_grad():
        # A step that all tokens share moves no direction: the changes are centred.
        erased.get_input_embeddings().weight += torch.randn(len(tokenizer), rank) @ directions + 5

    hidden = hidden_effect(ModelPair(erased, tiny_model), tokenizer, TEXTS)

    assert hidden.effective_rank[0] == pytest.approx(rank, rel=1e-4 if rank == 1 else 0.2)
    assert hidden.effective_rank[0] <= rank + 1e-4


def test_the_change_agrees_with_texts_run_one_by_one(tiny_peft_model, tokenizer):
    pair = ModelPair(fill(tiny_peft_model))

    hidden = hidden_effect(pair, tokenizer, TEXTS, max_length=12, batch_size=3)

    states = {}
    for side in ("reference", "erased"):
        with pair.use(side) as model:
            found = [hidden_states(model, tokenizer, [t], positions="all", max_length=12)[0] for t in TEXTS]
        states[side] = torch.cat([text[:, 1:] for text in found], dim=1).double()
    change = states["erased"] - states["reference"]
    for layer in (1, 2):
        # Singular values through the eigenvalues of the covariance.
        variances = torch.linalg.eigvalsh(change[layer].T.cov()).clamp(min=0)
        assert hidden.effective_rank[layer] == pytest.approx(effective_rank(variances.sqrt()), rel=1e-4)
        size = change[layer].norm(dim=-1).sum() / states["reference"][layer].norm(dim=-1).sum()
        assert hidden.relative_size[layer].value == pytest.approx(float(size), rel=1e-5)
    assert hidden.tokens == change.size(1) and hidden.relative_size[1].n == len(TEXTS)


def test_no_more_texts_are_read_than_asked_for(tiny_peft_model, tokenizer):
    tokens = len(tokenizer(TEXTS[0])["input_ids"]) - 1
    hidden = hidden_effect(ModelPair(tiny_peft_model), tokenizer, TEXTS, max_tokens=tokens)

    assert hidden.tokens == tokens and hidden.relative_size[0].n == 1


def test_texts_of_a_token_or_two_and_models_of_other_shapes_are_refused(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="`texts` has 1 tokens beside first ones"):
        hidden_effect(ModelPair(tiny_model, tiny_model), tokenizer, ["The cat"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    other = LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="reference has 2 layers of width 32 and the erased model 3 layers"):
        hidden_effect(ModelPair(other, tiny_model), tokenizer, TEXTS)
