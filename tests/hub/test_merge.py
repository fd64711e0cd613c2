import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from elm_trainer.hub.load import merge_erased

from .published import adapt, logits


@pytest.fixture
def erased(tiny_model, tokenizer, tmp_path):
    """An adapter on a base that was read from a folder of this machine."""
    tiny_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}]
)
def test_merged_weights_give_the_logits_of_the_adapter(settings, tiny_model, tokenizer, tmp_path):
    erased = adapt(tiny_model, **settings)
    with torch.no_grad():
        for name, parameter in erased.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    before = logits(erased)
    folder = merge_erased(erased, tokenizer, tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), before, atol=1e-5)
    assert torch.equal(logits(erased), before) and isinstance(erased, PeftModel)
    with erased.disable_adapter():
        assert not torch.allclose(logits(erased), before, atol=1e-2)


def test_the_weights_are_split_into_safetensors_with_a_tokenizer(erased, tokenizer, tmp_path):
    folder = merge_erased(erased, tokenizer, tmp_path / "merged", max_shard_size="5MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert not list(folder.glob("*.bin")) and not list(folder.glob("adapter*"))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(erased), atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder)("Lima")["input_ids"] == tokenizer("Lima")["input_ids"]


def test_no_path_of_the_machine_is_written(erased, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    folder = merge_erased(erased, tokenizer, tmp_path / "merged")
    for path in folder.glob("*.json*"):
        assert str(tmp_path) not in path.read_text(), path.name
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_only_active_adapters_are_merged(erased, tokenizer, tmp_path):
    before = logits(erased)
    erased.add_adapter("other", erased.peft_config["default"])
    with torch.no_grad():
        for name, parameter in erased.named_parameters():
            if ".other." in name:
                parameter.normal_()
    folder = merge_erased(erased, tokenizer, tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), before, atol=1e-5)


@pytest.mark.parametrize("as_file", [True, False])
def test_nothing_is_overwritten(as_file, erased, tokenizer, tmp_path):
    place = tmp_path / "merged"
    if as_file:
        place.write_text("precious")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="`output_dir` .*merged is not an empty folder: name another one"):
        merge_erased(erased, tokenizer, place)
    assert (place if as_file else place / "notes.txt").read_text() == "precious"


def test_an_empty_folder_is_used(erased, tokenizer, tmp_path):
    (tmp_path / "merged").mkdir()
    folder = merge_erased(erased, tokenizer, tmp_path / "merged")
    assert load_file(folder / "model.safetensors")["model.norm.weight"].shape == (32,)


def test_weights_that_are_no_numbers_are_not_written(erased, tokenizer, tmp_path):
    with torch.no_grad():
        next(p for name, p in erased.named_parameters() if "lora_B" in name)[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        merge_erased(erased, tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_quantised_base_is_refused_with_the_fix(erased, tokenizer, tmp_path):
    config = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map={"": "cpu"})
    with pytest.raises(ValueError, match="The base is quantized.*load the adapter without `quantization_config`"):
        merge_erased(adapt(base), tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
