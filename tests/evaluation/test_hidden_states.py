import copy
import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from elm_trainer.evaluation.hidden_states import (
    activation_norms,
    decoder_of,
    effective_rank,
    final_norm,
    hidden_effect,
    hidden_states,
    stable_rank,
    weight_effects,
)
from elm_trainer.evaluation.pair import ModelPair


TEXTS = [
    "Bread needs flour, water and some salt.",
    "The cat sat on the mat.",
    "A short one",
    "On Sundays the market opens late, and the fish is gone by noon, as everybody in the village knows.",
]
ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "gemma2", "opt"]


def build_model(architecture, vocab_size):
    """A random two-layer model of an architecture."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "llama": lambda: LlamaConfig(**sizes, intermediate_size=64),
        "gpt2": lambda: GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4),
        "gpt_neox": lambda: GPTNeoXConfig(**sizes, intermediate_size=64),
        "gemma2": lambda: Gemma2Config(**sizes, intermediate_size=64, num_key_value_heads=2, head_dim=8),
        "opt": lambda: OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32),
    }[architecture]()
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
            else:
                # Norms that are not the identity, so that applying one twice would show.
                parameter.add_(torch.rand_like(parameter))
    return model


def plant(model, tokenizer, layer, vectors):
    """Have a layer add a vector to the last token of each of some texts; returns the hooks' handles."""
    by_ids = {tuple(tokenizer(text)["input_ids"]): vector for text, vector in vectors.items()}
    batch = []

    def note(_, args, kwargs):
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(kwargs["input_ids"]) if mask is None else mask
        batch[:] = [row[keep.bool()].tolist() for row, keep in zip(kwargs["input_ids"], mask, strict=True)]

    def write(_, args, output):
        output = output.clone()
        for row, ids in enumerate(batch):
            if tuple(ids) in by_ids:
                output[row, len(ids) - 1] += by_ids[tuple(ids)]
        return output

    return [
        model.model.register_forward_pre_hook(note, with_kwargs=True),
        model.model.layers[layer].register_forward_hook(write),
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_of_a_plain_run_and_the_last_stands_before_the_final_norm(architecture, tokenizer):
    model = build_model(architecture, len(tokenizer))

    found = hidden_states(model, tokenizer, TEXTS, positions="all", batch_size=3)

    for text, states in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states
            torch.testing.assert_close(states[:-1], torch.cat(expected[:-1]), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(final_norm(model)(states[-1:]), expected[-1], atol=1e-4, rtol=1e-4)
            assert not torch.allclose(states[-1:], expected[-1], atol=1e-2)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_neither_batch_size_nor_padding_changes_a_state(batch_size, padding_side, adapted_model, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = padding_side
    alone = [hidden_states(adapted_model, tokenizer, [text], positions="all")[0] for text in TEXTS * 3]

    together = hidden_states(adapted_model, tokenizer, TEXTS * 3, positions="all", batch_size=batch_size)

    for expected, states in zip(alone, together, strict=True):
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_the_last_position_is_the_last_of_all(tiny_model, tokenizer):
    last = hidden_states(tiny_model, tokenizer, TEXTS, max_length=5)
    all_positions = hidden_states(tiny_model, tokenizer, TEXTS, positions="all", max_length=5)

    for one, every in zip(last, all_positions, strict=True):
        assert one.shape == (3, 1, 32) and every.size(1) <= 5
        torch.testing.assert_close(one, every[:, -1:])


def test_the_adapter_is_in_place_and_the_head_is_never_run(adapted_model, tokenizer):
    calls = []
    adapted_model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))

    adapted = hidden_states(adapted_model, tokenizer, TEXTS[:1])[0]
    with adapted_model.disable_adapter():
        reference = hidden_states(adapted_model, tokenizer, TEXTS[:1])[0]

    assert not calls
    torch.testing.assert_close(adapted[0], reference[0])
    assert not torch.allclose(adapted[1:], reference[1:], atol=1e-2)


def test_half_precision_states_come_back_in_float32(tiny_model, tokenizer):
    [states] = hidden_states(tiny_model.to(torch.bfloat16), tokenizer, TEXTS[:1])

    assert states.dtype == torch.float32
    assert torch.equal(states, states.bfloat16().float())


def test_norms_agree_with_texts_run_one_by_one(adapted_model, tokenizer):
    norms = activation_norms(ModelPair(adapted_model), tokenizer, TEXTS, max_length=12, batch_size=3)

    totals = {}
    for side, found in (("reference", norms.reference), ("erased", norms.erased)):
        with ModelPair(adapted_model).use(side) as model:
            states = [hidden_states(model, tokenizer, [text], positions="all", max_length=12)[0] for text in TEXTS]
        lengths = [[[float(token.norm()) for token in layer[1:]] for layer in text] for text in states]
        totals[side] = [sum(sum(text[layer]) for text in lengths) for layer in range(3)]
        tokens = sum(len(text[0]) for text in lengths)
        assert [figure.value for figure in found] == pytest.approx(
            [total / tokens for total in totals[side]], rel=1e-5
        )
        assert all(figure.n == len(TEXTS) and figure.low < figure.value < figure.high for figure in found)
    ratios = [erased / reference for erased, reference in zip(totals["erased"], totals["reference"], strict=True)]
    assert [figure.value for figure in norms.ratio] == pytest.approx(ratios, rel=1e-5)
    assert abs(ratios[2] - 1) > 0.01


def test_doubled_embeddings_have_twice_the_norm_in_every_resample(tiny_model, tokenizer):
    erased = copy.deepcopy(tiny_model)
    with torch.no_grad():
        erased.get_input_embeddings().weight.mul_(2)

    ratio = activation_norms(ModelPair(erased, tiny_model), tokenizer, TEXTS).ratio[0]

    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2), rel=1e-6)


def test_the_first_token_does_not_count(tiny_model, tokenizer):
    texts = [f"Paris {text}" for text in TEXTS]
    pair = ModelPair(tiny_model, tiny_model)
    before = activation_norms(pair, tokenizer, texts).reference[0].value
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight[tokenizer(texts[0])["input_ids"][0]] *= 1000

    assert activation_norms(pair, tokenizer, texts).reference[0].value == pytest.approx(before)


@pytest.mark.parametrize(("texts", "message"), [([], "`texts` is empty"), (["Bread", ""], "`texts` holds ''")])
def test_nothing_to_read_is_an_error(texts, message, tiny_model, tokenizer):
    with pytest.raises(ValueError, match=message):
        hidden_states(tiny_model, tokenizer, texts)


def test_a_model_without_a_final_norm_is_refused_by_name(tokenizer):
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, do_layer_norm_before=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="final norm of OPTDecoder cannot be found"):
        final_norm(AutoModelForCausalLM.from_config(config).eval())


def test_a_learned_prompt_is_refused(tiny_model):
    model = get_peft_model(tiny_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="'default' is a PROMPT_TUNING"):
        decoder_of(model)


def test_a_decoder_without_a_head_is_refused(tiny_model):
    with pytest.raises(ValueError, match="LlamaModel has no decoder apart from its head"):
        decoder_of(tiny_model.model)


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
