import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from elm_trainer.fingerprint import base_fingerprint
from elm_trainer.hub.errors import BaseMismatchError
from elm_trainer.hub.info import check_base

from ..test_fingerprint import SHAPES, make


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_quantised_base_is_checked_by_what_quantisation_leaves_alone(shape, bits, tmp_path):
    model = make(shape)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype="float32", device_map={"": "cpu"}
    )
    adapter = get_peft_model(quantised, LoraConfig(target_modules="all-linear"))
    check_base(adapter, base_fingerprint(model), "org/base")
    with torch.no_grad():
        next(
            module
            for name, module in quantised.named_modules()
            if name.endswith("embed_tokens") or name.endswith("wte")
        ).weight[0] += 1
    with pytest.raises(BaseMismatchError, match="not org/base.*the embeddings, norms or biases differ"):
        check_base(adapter, base_fingerprint(model), "org/base")


def test_another_base_is_named_with_what_differs_and_the_fix():
    model = make()
    check_base(model, base_fingerprint(model), "org/base")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(BaseMismatchError, match="not org/base.*the weights differ.*`allow_mismatch=True`"):
        check_base(other, base_fingerprint(model), "org/base")


def test_offloaded_weights_are_named_with_the_way_around_them():
    model = make()
    expected = base_fingerprint(model)
    model.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"`model.norm.weight` was offloaded.*`allow_mismatch=True`"):
        check_base(model, expected, "org/base")
