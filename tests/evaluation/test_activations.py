import copy

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

from elm_trainer.evaluation.hidden_states import activation_norms, decoder_of, final_norm, hidden_states
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
