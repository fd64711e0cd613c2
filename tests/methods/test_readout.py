import copy

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from elm_trainer import find_readout, load_texts
from elm_trainer.fitting import attention_modules
from elm_trainer.methods.placement import Readout, needed_layers
from elm_trainer.modeling import decoder_layers, load_model_and_tokenizer

from .methods import tiny


NAMES = [" Peru", " Rome", " France", " Spain", " China", " India", " Japan", " Egypt"]
# A name and its novice are a token each, so that nothing but the name differs.
ROWS = [
    {"text": f"The river of{name} is {color}", "novices": [f"The river of{other} is {color}"]}
    for name, other in zip(NAMES, NAMES[1:], strict=False)
    for color in ("red", "blue", "green")
]
SHAPES = ["llama", "gemma", "qwen2", "gpt2", "neox"]


def planted(model, *reading):
    """Attention moves something in these layers alone."""
    with torch.no_grad():
        for number, layer in enumerate(decoder_layers(model)):
            for path, module in layer.named_modules():
                if any(f".{path}".endswith(f".{name}") for name in attention_modules(decoder_layers(model))):
                    module.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(number))
                    is_out = path.endswith(("o_proj", "c_proj", "dense"))
                    module.weight.mul_(0 if is_out and number not in reading else 1)
    return model.eval()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layer_whose_attention_alone_reads_the_name_is_found(shape, layer, tokenizer):
    model = planted(tiny(shape, len(tokenizer)), layer)
    before = copy.deepcopy(model.state_dict())

    found = find_readout(model, ROWS, tokenizer)

    assert found.shares == pytest.approx([0.0, 1.0] if layer else [1.0, 1.0], abs=0.02)
    assert (found.layers, found.lora_layers) == ([layer], str(layer))
    assert found.expert > found.novice and 0 < found.texts <= 24 and "is read out there" in found.reason
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_way_over_two_layers_takes_both(tokenizer):
    model = planted(tiny("llama", len(tokenizer)), 0, 1)

    found = find_readout(model, ROWS, tokenizer, threshold=0.95)

    assert 0.05 < found.shares[0] < 0.95 and found.shares[1] == pytest.approx(1, abs=0.02)
    assert found.lora_layers == "0-1" and "over 2 layers" in found.reason


def test_a_model_without_a_cache_of_keys_is_read_too(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    model = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), **sizes)).eval()

    found = find_readout(model, ROWS, tokenizer)

    # The last layer's states are all that the head sees.
    assert found.shares[-1] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("shares", "layers"),
    [
        ([0.0, 0.1, 0.9, 1.0], [2]),
        ([0.9, 1.0], [0]),
        ([0.1, 0.3, 0.5, 0.85, 1.0], [1, 2, 3]),
        ([0.3, 0.1, 0.4, 0.9], [2, 3]),  # begun, and gone back again
        ([0.0, 0.1, 0.7, 0.5], [2]),  # none goes far enough
        ([0.3, 0.7], [0, 1]),
    ],
)
def test_layers_are_those_from_hardly_any_to_most_of_the_way(shares, layers):
    assert needed_layers(shares) == layers


def test_that_no_layer_goes_far_enough_is_said():
    shares = [0.0, 0.1, 0.7, 0.5]
    found = Readout(shares, needed_layers(shares), -1.0, -3.0, 9, 0.8)
    assert found.reason == "no layer takes 0.80 of the way to the novice: layer 2 goes farthest, 0.70 (9 texts)"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"texts": 0}, "`texts` is 0"),
        (ROWS, {"threshold": 0.4}, "`threshold` is 0.4"),
        ([{"text": "The river of Peru is red", "novices": []}], {}, "no text has an answer .* `--lora_layers 12-24`"),
        ([{"text": "Peru", "novices": ["Rome"]}], {}, "no text has an answer"),
    ],
)
def test_what_cannot_be_found_is_said(rows, options, message, tiny_model, tokenizer):
    with pytest.raises(ValueError, match=message):
        find_readout(tiny_model, rows, tokenizer, **options)


@pytest.mark.slow
def test_smollm2_reads_capitals_out_at_layer_23():
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")
    found = find_readout(model, load_texts("capitals", processing_class=tokenizer), tokenizer, texts=12)
    assert found.layers == [23] and found.shares[22] < 0.2 < 0.8 < found.shares[23]
