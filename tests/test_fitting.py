from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from benchmarks.doctor import MODELS
from elm_trainer import ElmConfig, distributed
from elm_trainer.cli.erase_options import ErasureArguments
from elm_trainer.cli.recipes import find_recipe
from elm_trainer.distributed import free_memory, multiplies_in_bfloat16
from elm_trainer.fitting import (
    AUTO,
    OBJECTIVES,
    OPTIONS,
    attention_modules,
    empty_model,
    expected_readout,
    fitting_settings,
    machine_settings,
    objective_settings,
)
from elm_trainer.modeling import decoder_layers


GB = 10**9


def llama(hidden, intermediate, layers, vocab=32000, heads=None):
    heads = heads or hidden // 64
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocab,
    )  # fmt: skip


SIZES = {
    "30M": llama(384, 1024, 8, 49152), "135M": llama(576, 1536, 30, 49152), "1B": llama(2048, 8192, 16),
    "7B": llama(4096, 14336, 32), "70B": llama(8192, 28672, 80),
}  # fmt: skip
MEMORIES = [GB, 2 * GB, 4 * GB, 8 * GB, 16 * GB, 24 * GB, 48 * GB, 80 * GB, 160 * GB, 320 * GB, 640 * GB]
TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS = {
    "llama": (LlamaConfig(**TINY, intermediate_size=64), "gate_proj,up_proj"),
    "qwen2": (Qwen2Config(**TINY, intermediate_size=64, num_key_value_heads=2), "gate_proj,up_proj"),
    "gemma3": (
        Gemma3TextConfig(**TINY, intermediate_size=64, num_key_value_heads=1, head_dim=16),
        "gate_proj,up_proj",
    ),
    "gpt2": (GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4), "c_fc"),
    "gpt-neox": (GPTNeoXConfig(**TINY, intermediate_size=128), "dense_h_to_4h"),
}


def values(fitted):
    """The settings without their reasons."""
    return SimpleNamespace(**{name: choice.value for name, choice in fitted.choices.items()})


@pytest.mark.parametrize("size", SIZES)
def test_more_memory_never_gives_less(size):
    fitted = [fitting_settings(SIZES[size], memory=memory, device="cpu") for memory in MEMORIES]
    chosen = [*map(values, fitted)]

    batches = [settings.per_device_train_batch_size for settings in chosen]
    assert batches == sorted(batches)
    checkpointing = [settings.activation_checkpointing for settings in chosen]
    assert checkpointing == sorted(checkpointing, reverse=True)
    assert [settings.dtype for settings in chosen] == sorted(settings.dtype for settings in chosen)
    fits = [settings.fits for settings in fitted]
    assert fits == sorted(fits) and fits[-1]
    assert all(
        settings.needed <= 0.8 * memory for settings, memory in zip(fitted, MEMORIES, strict=True) if settings.fits
    )
    assert all(
        settings.per_device_train_batch_size * settings.gradient_accumulation_steps == 10 for settings in chosen
    )


@pytest.mark.parametrize("size", SIZES)
def test_layers_lie_inside_and_every_setting_has_a_reason(size):
    settings = fitting_settings(SIZES[size], memory=640 * GB, device="cpu")

    first, last = map(int, values(settings).lora_layers.split("-"))
    assert 0 <= first <= last < SIZES[size].num_hidden_layers
    assert list(settings.choices) == list(OPTIONS)
    assert all(choice.reason for choice in settings.choices.values())


def test_the_rules_give_what_was_found_best():
    settings = values(fitting_settings(SIZES["135M"], memory=16 * GB, device="cpu"))

    assert (settings.lora_layers, settings.lora_targets) == ("12-24", "gate_proj,up_proj")
    assert (settings.lora_rank, settings.per_device_train_batch_size) == (64, 10)
    assert settings.bf16 == multiplies_in_bfloat16(torch.device("cpu"))
    gemma = Gemma3TextConfig(num_hidden_layers=18, hidden_size=640, intermediate_size=2048, vocab_size=1000)
    assert values(fitting_settings(gemma, memory=16 * GB, device="cpu")).lora_layers == "7-14"


@pytest.mark.parametrize("layers", range(1, 9))
def test_shallow_models_get_layers_too(layers):
    config = LlamaConfig(**TINY | {"num_hidden_layers": layers}, intermediate_size=64)

    first, last = map(int, values(fitting_settings(config, memory=GB, device="cpu")).lora_layers.split("-"))

    assert 0 <= first <= last < layers


def test_attention_is_found_in_each_architecture():
    found = {kind: attention_modules(decoder_layers(empty_model(config))) for kind, (config, _) in KINDS.items()}
    assert found["llama"] == found["qwen2"] == found["gemma3"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    # The feed-forward part of GPT-2 has a `c_proj` too.
    assert found["gpt2"] == ["attn.c_proj", "c_attn"]
    assert found["gpt-neox"] == ["dense", "query_key_value"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_yet_to_be_found_is_planned_for(kind):
    config, _ = KINDS[kind]
    names = attention_modules(decoder_layers(empty_model(config)))
    given = {"lora_layers": AUTO, "lora_targets": ",".join(names)}

    settings = fitting_settings(config, memory=4 * GB, device="cpu", given=given)

    assert values(settings).lora_layers == AUTO
    named = fitting_settings(
        config, memory=4 * GB, device="cpu", given=given | {"lora_layers": str(expected_readout(3))}
    )
    assert settings.needed == named.needed
    assert (expected_readout(30), expected_readout(1)) == (23, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_leads_into_the_feed_forward_part_is_found_in_each_architecture(kind):
    config, expected = KINDS[kind]

    settings = fitting_settings(config, memory=4 * GB, device="cpu")

    assert (values(settings).lora_targets, values(settings).lora_rank) == (expected, 8)
    assert fitting_settings(empty_model(config), memory=4 * GB, device="cpu") == settings


def test_what_is_given_stays_and_the_rest_fits_to_it():
    free = values(fitting_settings(SIZES["1B"], memory=16 * GB, device="cpu"))

    fitted = fitting_settings(
        SIZES["1B"], memory=16 * GB, device="cpu", given={"lora_rank": 7, "per_device_train_batch_size": 2}
    )
    settings = values(fitted)

    assert (settings.lora_rank, settings.lora_alpha) == (7, 7) and fitted.choices["lora_rank"].reason == "given"
    assert settings.gradient_accumulation_steps == 5 and settings.lora_layers == free.lora_layers


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"given": {"rank": 3}}, "`given` names \\['rank'\\].*lora_rank"), ({"memory": 0}, "`memory`")],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        fitting_settings(SIZES["30M"], **{"memory": GB, "device": "cpu", **wrong})


def test_a_container_limits_what_is_free(tmp_path, monkeypatch):
    for name, text in {"max": "5000000", "current": "4000000", "stat": "anon 1\ninactive_file 500000"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(distributed, "_CGROUP", tmp_path)
    assert free_memory(torch.device("cpu")) == 1_500_000

    (tmp_path / "memory.max").write_text("max")
    assert free_memory(torch.device("cpu")) > 10**7


def test_the_benchmark_adapts_the_layers_of_the_rule():
    for shape, layers in MODELS.values():
        if shape is not None:
            config = llama(shape.hidden, shape.intermediate, shape.layers, 100, shape.heads)
            assert values(fitting_settings(config, memory=GB, device="cpu")).lora_layers == layers


@pytest.mark.parametrize(
    ("objective", "name"), [("log-space", "smollm2-135m-capitals-log-space"), ("readout", "smollm2-135m-capitals")]
)
def test_the_objective_is_that_of_the_recipe(objective, name):
    recipe = yaml.safe_load(find_recipe(name).read_text())
    tested = dict(OBJECTIVES[objective])
    if objective == "readout":
        # The recipe names what is found in the model.
        assert tested.pop("lora_layers") == AUTO
        assert (recipe["lora_layers"], recipe["state_layers"]) == ("23", [23])
        model = empty_model(LlamaConfig(**TINY, intermediate_size=64))
        assert set(recipe["lora_targets"].split(",")) == set(attention_modules(decoder_layers(model)))
        # Its last steps in log space were measured with the capitals alone, as was the larger step that its texts allow for.
        assert recipe["erase_after"] > 0 == tested.pop("erase_weight")
        assert tested.pop("retain_weight") < recipe["retain_weight"]
        assert tested.pop("state_eta") < recipe["state_eta"]
    assert {name: recipe[name] for name in tested} == tested
    assert set(OBJECTIVES) == set(ErasureArguments.__dataclass_fields__["objective"].metadata["choices"])
    known = {**ElmConfig.__dataclass_fields__, **ErasureArguments.__dataclass_fields__}
    assert all(name in known for some in OBJECTIVES.values() for name in some)


def chosen(texts=600, longest=70, counterfactual=True, **given):
    found = objective_settings(texts, longest, counterfactual=counterfactual, given=given)
    assert all(choice.reason for choice in found.values()) and not found.keys() & given.keys()
    return {name: choice.value for name, choice in found.items()}


def test_what_the_texts_have_decides_about_the_objective_unless_it_is_given():
    assert chosen()["objective"] == "readout" and chosen(counterfactual=False)["objective"] == "contexts"
    assert "state_weight" not in chosen(novice="contexts") and chosen(novice="contexts")["learning_rate"] == 1e-4
    assert chosen(counterfactual=False, novice="counterfactual")["state_weight"] == 1
    assert chosen(objective="log-space")["log_tokens"] == 8 and "log_tokens" not in chosen()
    alike = objective_settings(9, 9, counterfactual=True, alike=True)
    assert alike["state_eta"].value == 2.5 > chosen()["state_eta"]
    assert alike["retain_weight"].value == 1.5 < chosen()["retain_weight"]
    assert "state_eta" not in objective_settings(9, 9, counterfactual=False, alike=True)
    # A preset says itself what the table says of these.
    assert not chosen(preset="released").keys() & {"eta", "state_weight", "retain_loss"}
    assert chosen(state_eta=2.0)["state_weight"] == 1
    found = objective_settings(9, 9, counterfactual=True, given={}, attention=["q_proj", "attn.c_proj"])
    assert (found["lora_layers"].value, found["lora_targets"].value) == ("auto", "q_proj,attn.c_proj")
    assert found["novice"].value == "counterfactual"


def test_terms_become_unknown_words_at_early_layers():
    found = objective_settings(3000, 60, counterfactual=True, by_terms=True, attention=["q_proj"], depth=30)
    values = {name: choice.value for name, choice in found.items()}
    assert (values["objective"], values["lora_layers"], values["state_layers"]) == ("terms", "3-9", [9])
    assert values["state_names"] and values["lora_targets"] == "all-linear"
    assert (values["dataset_size"], values["num_train_epochs"]) == (1536, 4)
    few = objective_settings(9, 60, counterfactual=True, by_terms=True, depth=2)
    assert (few["lora_layers"].value, few["state_layers"].value, few["num_train_epochs"].value) == ("0-1", [1], 24)
    given = objective_settings(9, 60, counterfactual=True, by_terms=True, depth=30, given={"lora_layers": "5-7"})
    assert given["state_layers"].value == [7] and "lora_layers" not in given
    found = objective_settings(9, 60, counterfactual=True, by_terms=True, depth=30, given={"lora_layers": "auto"})
    assert "state_layers" not in found  # they are found with the others
    # Where there are no novices, or something else is wanted, it is that.
    assert objective_settings(9, 9, counterfactual=False, by_terms=True)["objective"].value == "contexts"
    assert (
        objective_settings(9, 9, counterfactual=True, by_terms=True, given={"eta": 2})["objective"].value
        == "log-space"
    )


@pytest.mark.parametrize("name", ["eta", "eta_end", "log_tokens", "log_strength"])
def test_a_setting_that_the_readout_does_not_read_is_not_given_for_nothing(name):
    found = objective_settings(9, 9, counterfactual=True, given={name: 2})
    assert found["objective"].value == "log-space" and found["objective"].reason.startswith(f"`{name}` is given")
    assert chosen(**{name: 2}, novice="counterfactual")["objective"] == "log-space"
    # By contexts each may be one of the paper's; 0 turns it off; and who sets the readout wants that.
    assert chosen(counterfactual=False, **{name: 2})["objective"] == "contexts"
    assert chosen(**{name: 0})["objective"] == "readout"
    for setting in ({"state_eta": 2.0}, {"retain_loss": "states"}, {"erase_after": 0.9}):
        assert chosen(**{name: 2}, **setting)["objective"] == "readout"
    for setting in ({"retain_loss": "log"}, {"erase_after": 0.0}):
        assert chosen(**{name: 2}, **setting)["objective"] == "log-space"


def test_whose_odds_other_tokens_have_matters_in_log_space_alone():
    assert chosen(log_others="novice")["objective"] == "log-space"
    assert chosen(log_others="reference")["objective"] == "readout"


@pytest.mark.parametrize("name", ["fact_share", "retain_focus", "contrast_rows", "contrast_damping"])
def test_what_the_readout_reads_too_leaves_it_there(name):
    assert chosen(**{name: 0.5})["objective"] == "readout"


@pytest.mark.parametrize(("texts", "rows", "passes"), [(9, 256, 24), (324, 324, 19), (600, 600, 10), (9000, 1024, 10)])
def test_at_the_readout_there_are_at_least_600_steps(texts, rows, passes):
    found = chosen(texts)
    assert (found["dataset_size"], found["num_train_epochs"]) == (rows, passes)
    assert rows * passes / 10 >= 600 and "num_train_epochs" not in chosen(texts, max_steps=7)


@pytest.mark.parametrize("texts", [9, 512, 700, 9000])
def test_rows_follow_the_texts(texts):
    log = {"objective": "log-space"}
    assert chosen(texts, **log)["dataset_size"] == 512 and chosen(texts, **log)["num_train_epochs"] == 2
    reason = objective_settings(texts, 70, counterfactual=True, given=log)["dataset_size"].reason
    assert f"{texts} forget texts" in reason
    assert ("evenly over all facts" in reason) == (texts > 512) and ("repeated" in reason) == (texts < 512)
    assert "num_train_epochs" not in chosen(texts, max_steps=5, **log)
    few = chosen(texts, counterfactual=False)
    assert few["dataset_size"] == min(max(texts, 128), 1024) and few["num_train_epochs"] == 3


@pytest.mark.parametrize(("longest", "length"), [(3, 80), (80, 80), (81, 88), (5000, 256)])
def test_the_length_follows_the_longest_text(longest, length):
    assert chosen(longest=longest)["max_length"] == length


def test_a_cpu_gets_what_is_fast_there():
    fitted = fitting_settings(SIZES["135M"], memory=16 * GB, device="cpu")
    found = machine_settings(fitted, torch.device("cpu"))
    assert found["use_cpu"].value and found["bf16_full_eval"] == fitted.choices["bf16"]
    assert found["lora_rank"] == fitted.choices["lora_rank"]
    assert set(machine_settings(fitted, torch.device("meta"))) == set(OPTIONS)
