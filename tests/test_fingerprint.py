import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from elm_trainer.fingerprint import SAMPLES, base_fingerprint, bit_sums


SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
)
SHAPES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=2, n_positions=32)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "gemma": (GemmaForCausalLM, GemmaConfig(**SIZES)),
}


def make(shape="llama"):
    torch.manual_seed(0)
    model_class, config = SHAPES[shape]
    return model_class(copy.deepcopy(config)).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_same_in_bfloat16_with_an_adapter_and_read_from_disk(shape, tmp_path):
    model = make(shape)
    found = base_fingerprint(model)
    assert base_fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == found
    model.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        assert base_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == found
    adapter = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert base_fingerprint(adapter) == found
    assert base_fingerprint(adapter.get_base_model()) == found
    assert base_fingerprint(adapter.unload()) == found


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=False),
        LoraConfig(target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head", "norm"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
        LoraConfig(target_modules=[], target_parameters=["mlp.down_proj.weight"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(target_modules=["q_proj"]),
        VeraConfig(target_modules=["q_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_no_method_of_adapting_changes_it(config):
    found = base_fingerprint(make())
    model = get_peft_model(make(), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
            assert parameter.requires_grad, name
    assert base_fingerprint(model) == found


def test_a_tied_head_is_the_same_as_an_equal_copy():
    tied = make("llama-tied")
    untied = LlamaForCausalLM(LlamaConfig(**SIZES))
    untied.load_state_dict(tied.state_dict())
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert base_fingerprint(tied) == base_fingerprint(untied)


def test_every_sampled_weight_counts():
    model = make()
    found = base_fingerprint(model)["weights"]
    for name, parameter in model.named_parameters():
        flat = parameter.data.flatten()
        for sample in range(0, SAMPLES, 9):
            place = sample * (flat.numel() - 1) // (SAMPLES - 1)
            before = flat[place].item()
            parameter.data.view(-1)[place] = before + 1
            assert base_fingerprint(model)["weights"] != found, (name, place)
            parameter.data.view(-1)[place] = before
    assert base_fingerprint(model)["weights"] == found


def test_names_and_shapes_count():
    model = make()
    found = base_fingerprint(model)
    renamed = copy.deepcopy(model)
    renamed.model.final_norm = renamed.model.norm
    del renamed.model.norm
    reshaped = copy.deepcopy(model)
    reshaped.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data.view(32, 128)
    other_head = copy.deepcopy(model)
    other_head.lm_head.weight.data = other_head.lm_head.weight.data.view(64, 97)
    for other in (renamed, reshaped, other_head):
        assert base_fingerprint(other)["weights"] != found["weights"]
    assert base_fingerprint(renamed)["unquantized"] != found["unquantized"]
    assert base_fingerprint(other_head)["unquantized"] != found["unquantized"]
    assert base_fingerprint(reshaped)["unquantized"] == found["unquantized"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_quantised_base_is_compared_by_what_quantisation_leaves_alone(shape, bits, tmp_path):
    model = make(shape)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype="float32", device_map={"": "cpu"}
    )
    kinds = {type(module).__name__ for module in quantised.modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    assert base_fingerprint(quantised) == {"unquantized": base_fingerprint(model)["unquantized"]}


def test_offloaded_weights_are_named():
    model = make()
    model.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"`model.norm.weight` was offloaded.*`device_map`"):
        base_fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sums_tell_any_changed_weight_and_no_adapter(dtype):
    model = make().to(dtype)
    found = bit_sums(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        place = torch.randint(parameter.numel(), (), generator=generator)
        before = parameter.data.view(-1)[place].clone()
        parameter.data.view(-1)[place] = before + 0.1
        assert bit_sums(model) != found, name
        parameter.data.view(-1)[place] = before
    assert bit_sums(model) == found
    assert bit_sums(get_peft_model(model, LoraConfig(target_modules="all-linear"))) == found


def sum_of(values: torch.Tensor) -> str:
    model = nn.Module()
    model.weight = nn.Parameter(values, requires_grad=False)
    return bit_sums(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_sums_are_those_of_the_memory_wherever_it_lies(dtype):
    for size in (1, 3, 8, 21):
        values = torch.arange(1, size + 1).to(dtype)
        found = sum_of(values)
        shifted = torch.cat([values[:1], values])[1:]
        assert sum_of(shifted) == found and sum_of(torch.stack([values, values], 1)[:, 1]) == found
        for place in range(size):
            other = values.clone()
            other[place] += 1
            assert sum_of(other) != found


@pytest.mark.slow
def test_the_demo_model_is_read_in_less_than_a_second():
    import time

    from elm_trainer import load_model_and_tokenizer

    model, _ = load_model_and_tokenizer("smollm2-135m-instruct")
    found = base_fingerprint(model)
    started = time.perf_counter()
    assert base_fingerprint(model) == found
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    assert base_fingerprint(model.to(torch.bfloat16)) == found
    assert seconds < 1
