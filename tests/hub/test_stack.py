import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from elm_trainer import EvaluationSuite, evaluate_erasure, load_bank
from elm_trainer.evaluation.suite import OpenQuestion
from elm_trainer.hub.errors import BaseMismatchError, UnsafeAdapterError
from elm_trainer.hub.load import COMBINATIONS, load_erased, stack_erasures

from .published import adapt, edit_json, logits, seal, write_published


@pytest.fixture
def publish(base_folder, tokenizer, tmp_path):
    """Publish an erasure of the base into a folder."""

    def publish(name, **settings):
        model = adapt(AutoModelForCausalLM.from_pretrained(base_folder), **settings)
        return write_published(model, tokenizer, tmp_path / name, base_folder)

    return publish


@pytest.fixture
def two(publish):
    return {"capitals": publish("one", seed=1), "elements": publish("two", seed=2)}


def summed(base_folder, folders, weights=(1.0, 1.0)):
    """The base with the updates of several adapters added by hand."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    weighed = model.state_dict()
    for folder, weight in zip(folders, weights, strict=True):
        adapter, _ = load_erased(folder)
        merged = adapter.merge_and_unload().state_dict()
        plain = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
        for name in plain:
            weighed[name] += weight * (merged[name] - plain[name])
    return model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {}),
        ({"r": 2}, {"r": 5, "lora_alpha": 20}),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "down_proj"]}),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        ),
        (
            {"use_rslora": True, "r": 9},
            {"use_rslora": False, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
        ),
        ({"target_modules": r".*\.q_proj"}, {"target_modules": ["k_proj"], "exclude_modules": r".*layers\.0.*"}),
    ],
)
def test_cat_is_the_exact_sum_whatever_the_ranks_layers_and_targets(one, other, publish, base_folder):
    folders = [publish("one", seed=1, **one), publish("two", seed=2, **other)]
    model, tokenizer = stack_erasures(dict(zip(("capitals", "elements"), folders, strict=True)))
    assert torch.allclose(logits(model), logits(summed(base_folder, folders)), atol=1e-5)
    assert not model.training and model.active_adapters == ["default"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.decode(tokenizer("Lima")["input_ids"]) == "Lima"


def test_weights_set_the_strength_of_each(two, base_folder):
    model, _ = stack_erasures(two, weights={"elements": 0.25})
    assert torch.allclose(logits(model), logits(summed(base_folder, two.values(), (1.0, 0.25))), atol=1e-5)


def test_svd_of_full_rank_is_the_same_sum(two, base_folder):
    model, _ = stack_erasures(two, combination="svd", svd_rank=8)
    assert torch.allclose(logits(model), logits(summed(base_folder, two.values())), atol=1e-4)
    assert model.peft_config["default"].r == 8


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination_works(combination, two):
    torch.manual_seed(0)
    pruned = any(word in combination for word in ("ties", "dare", "magnitude"))
    model, _ = stack_erasures(two, combination=combination, density=0.5 if pruned else None)
    found = logits(model)
    with model.disable_adapter():
        assert found.isfinite().all() and not torch.allclose(found, logits(model), atol=1e-3)


def test_single_adapters_stay_and_can_be_chosen_or_dropped(two):
    model, _ = stack_erasures(two)
    stacked = logits(model)
    single, _ = load_erased(two["elements"])
    model.set_adapter("elements")
    assert torch.equal(logits(model), logits(single))
    model.set_adapter("default")
    model.delete_adapter("capitals")
    model.delete_adapter("elements")
    assert torch.equal(logits(model), stacked) and list(model.peft_config) == ["default"]


def test_settings_of_the_single_adapters_are_left_as_they_were(publish):
    one = {"target_modules": ["q_proj"], "layers_to_transform": [0], "use_rslora": True}
    folders = {"a": publish("one", **one), "b": publish("two", target_modules=["q_proj"])}
    model, _ = stack_erasures(folders)
    kept = model.peft_config["a"]
    assert (kept.layers_to_transform, kept.use_rslora, kept.target_modules) == ([0], True, {"q_proj"})


def test_unloading_a_stack_leaves_the_base_bit_for_bit(two, base_folder):
    model, _ = stack_erasures(two)
    found, expected = model.unload().state_dict(), AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_stack_alone_is_saved_as_an_adapter_is_published(publish, base_folder, tokenizer, tmp_path):
    settings = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    model, _ = stack_erasures(
        {"a": publish("one", **settings), "b": publish("two", seed=2, target_modules=["v_proj"])}
    )
    model.save_pretrained(tmp_path / "stack", selected_adapters=["default"])
    names = {path.name for path in (tmp_path / "stack").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    edit_json(tmp_path / "stack" / "adapter_config.json", base_model_name_or_path=str(base_folder))
    again, _ = load_erased(tmp_path / "stack")
    assert torch.equal(logits(again), logits(model))


def test_a_stack_gets_a_fresh_report_against_its_base(two):
    model, tokenizer = stack_erasures(two)
    suite = EvaluationSuite(
        banks={"capitals": load_bank("capitals")[:4]},
        roles={"capitals": "erased"},
        open_questions={"capitals": [OpenQuestion("What is the capital of Peru?", "Lima")]},
        cloze={"capitals": [OpenQuestion("Peru ->", "Lima")]},
        concept_prompts=["Tell me about Oslo."],
        retain_texts=["Bread needs flour.", "The cat sat on the mat."],
        max_new_tokens=3,
        answer_tokens=3,
    )
    report = evaluate_erasure(
        model, None, suite, tokenizer, measures=["multiple-choice", "open-answers", "specificity"]
    )
    single, _ = load_erased(two["capitals"])
    alone = evaluate_erasure(single, None, suite, tokenizer, measures=["specificity"])
    assert report["reference_sha256"] == alone["reference_sha256"]
    assert report["erased_sha256"] != alone["erased_sha256"]
    kl = [found["figures"]["retention.kl"]["erased"]["value"] for found in (report, alone)]
    assert kl[0] > 0 and kl[0] != kl[1]


def test_a_stack_stands_on_a_quantised_base_too(two, base_folder):
    config = BitsAndBytesConfig(load_in_8bit=True)
    model, _ = stack_erasures(two, quantization_config=config, device_map={"": "cpu"}, dtype="float32")
    assert torch.allclose(logits(model), logits(summed(base_folder, two.values())), atol=0.2)


def test_erasures_of_different_bases_are_named(two, base_folder, tokenizer, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    two["third"] = write_published(adapt(other), tokenizer, tmp_path / "three", "org/other")
    with pytest.raises(
        BaseMismatchError, match="capitals was trained on .*base .*, third on org/other .* weights differ"
    ):
        stack_erasures(two)
    model, _ = stack_erasures(two, allow_mismatch=True)
    assert set(model.peft_config) == {"capitals", "elements", "third", "default"}


def test_a_plain_folder_is_stacked_with_what_is_published(two, publish):
    plain = publish("plain", seed=3)
    (plain / "erasure.json").unlink()
    model, _ = stack_erasures(two | {"plain": plain})
    assert set(model.peft_config) == {*two, "plain", "default"}


def test_a_hostile_adapter_in_a_stack_is_refused(two):
    edit_json(two["elements"] / "adapter_config.json", megatron_config={"a": 1})
    seal(two["elements"])
    with pytest.raises(UnsafeAdapterError, match="`megatron_config`"):
        stack_erasures(two)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}])
def test_what_peft_cannot_combine_is_named(settings, two, publish):
    two["elements"] = publish("three", **settings)
    with pytest.raises(ValueError, match="elements has `(use_dora|modules_to_save)` .*, which PEFT can't combine"):
        stack_erasures(two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combination": "magic"}, "`combination` is 'magic'; use: cat, linear"),
        ({"combination": "ties"}, "`density` is None, but 'ties' keeps a share"),
        ({"combination": "dare_linear", "density": 2.0}, "`density` is 2.0"),
        (
            {"weights": {"capital": 2.0}},
            r"`weights` names \['capital'\], but `adapters` holds \['capitals', 'elements'\]",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message, two):
    with pytest.raises(ValueError, match=message):
        stack_erasures(two, **arguments)


@pytest.mark.parametrize("name", ["default", "a.b", "my lora", "LoRA", ""])
def test_names_that_peft_would_confuse_are_refused(name, two):
    with pytest.raises(ValueError, match=f"`adapters` names one {name!r}"):
        stack_erasures({name: two["capitals"], "elements": two["elements"]})


def test_one_erasure_is_no_stack(two):
    with pytest.raises(ValueError, match="`adapters` holds 1 erasures, but a stack needs two: use `load_erased`"):
        stack_erasures({"capitals": two["capitals"]})


@pytest.mark.parametrize("combination", ["linear", "ties", "dare_linear", "magnitude_prune"])
def test_ranks_that_a_combination_cannot_mix_are_named(combination, two, publish):
    two["elements"] = publish("three", r=2)
    with pytest.raises(
        ValueError, match=r"needs equal ranks, but they are \{'capitals': 4, 'elements': 2\}: use \"cat\""
    ):
        stack_erasures(two, combination=combination, density=0.5)


def test_the_saved_stack_states_its_own_rank(two, tmp_path):
    model, _ = stack_erasures(two)
    model.save_pretrained(tmp_path / "stack", selected_adapters=["default"])
    config = json.loads((tmp_path / "stack" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["task_type"] == "CAUSAL_LM"
