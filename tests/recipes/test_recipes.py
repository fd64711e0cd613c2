"""Recipes for models of billions of weights, without their weights: what each adapts, trains and takes."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from elm_trainer.cli import erase, planned_run
from elm_trainer.cli.doctor import CHECKS, examine
from elm_trainer.cli.erase_options import erasure_line
from elm_trainer.cli.planned_run import DoctorArguments, Hub, PlannedRun
from elm_trainer.cli.recipes import find_recipe, recipe_names
from elm_trainer.data import user_sources
from elm_trainer.fitting import empty_model, fitting_settings

from .stand_ins import MODELS, config, load_dataset, narrow, save, sizes


PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
CONCEPTS, KINDS = ("bio-cyber", "harry-potter"), ("", "-paper", "-released")
RECIPES = {
    name: next(m for m in MODELS if name.startswith(m)) for name in recipe_names() if name.startswith((*MODELS,))
}
# Ours for each model, and either the paper's or the released code's, with both concepts in turn.
STEPPED = [f"{model}-{CONCEPTS[place % 2]}" for place, model in enumerate(MODELS)]
STEPPED += [f"{model}-{CONCEPTS[place // 2 % 2]}{KINDS[1 + place % 2]}" for place, model in enumerate(MODELS)]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(user_sources, "load_dataset", load_dataset)
    monkeypatch.setattr(planned_run, "ask_hub", lambda: Hub(True, "the Hub is stood in for", True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save(config(name), name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(scope="module")
def empty(folders):
    """The models in their full size, on the meta device."""
    return {name: empty_model(AutoConfig.from_pretrained(folder)) for name, folder in folders.items()}


def planned(recipe, folder, *options):
    words = ["--recipe", recipe, f"--model={folder}", "--use_cpu=true", "--output_dir=unused", *options]
    return PlannedRun(*erasure_line("doctor", words, own=DoctorArguments).complete())


def inputs_and_outputs(name):
    """Of each matrix of a layer, by the config's numbers alone."""
    of = sizes(name)
    head = of.get("head_dim") or of["hidden_size"] // of["num_attention_heads"]
    hidden, inner, q, kv = (
        of["hidden_size"], of["intermediate_size"], head * of["num_attention_heads"], head * of["num_key_value_heads"],
    )  # fmt: skip
    return {
        "q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip


def test_there_is_a_recipe_of_each_kind_for_each_model_and_concept():
    expected = {f"{model}-{concept}{kind}" for model in MODELS for concept in CONCEPTS for kind in KINDS}
    assert set(RECIPES) == expected | {"zephyr-7b-beta-bio-cyber-rank4-released"}
    assert {name: yaml.safe_load(find_recipe(name).read_text())["model"] for name in RECIPES} == {
        name: MODELS[model].id for name, model in RECIPES.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_config_gives_the_weights_that_the_hub_counts(name, empty):
    assert empty[name].num_parameters() == MODELS[name].weights
    assert type(empty[name]).__name__ == config(name)["architectures"][0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_adapts_what_it_names_in_layers_that_exist(recipe, folders, empty):
    name = RECIPES[recipe]
    run = planned(recipe, folders[name], "--dataset_size=4")
    vars(run)["model"] = empty[name]  # of the same config
    found = examine(run, [c for c in CHECKS if c.name in ("model", "tokenizer", "settings", "texts", "questions")])
    assert not [check for check, finding in found.items() if finding.status == "problem"]
    assert all(said in found["tokenizer"].text for said in MODELS[name].says)

    with torch.device("meta"):
        adapted = get_peft_model(empty[name], run.lora)
    places = [n for n, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    # Directions that are chosen are not trained.
    chosen = run.config.contrast_rows > 0
    weights = [(n, p.numel()) for n, p in adapted.named_parameters() if p.requires_grad]
    trained = sum(count for n, count in weights if not (chosen and "lora_A" in n))
    adapted.unload()

    first, last = map(int, run.arguments.lora_layers.split("-"))
    targets = run.arguments.lora_targets.split(",")
    assert last < sizes(name)["num_hidden_layers"]
    assert sorted(
        (int(layer), module) for layer, module in (re.search(r"layers\.(\d+).*\.(\w+)$", n).groups() for n in places)
    ) == [(layer, module) for layer in range(first, last + 1) for module in sorted(targets)]
    assert not any("vision" in place for place in places)
    pairs = inputs_and_outputs(name)
    each = sum(pairs[target][1] + (0 if chosen else pairs[target][0]) for target in targets)
    assert trained == (last - first + 1) * run.arguments.lora_rank * each
    assert f"\n| `{recipe}` | {trained:,} | " in PAGE


@pytest.mark.parametrize("name", MODELS)
def test_our_settings_are_those_that_suit_the_model(name, folders, empty):
    run = planned(f"{name}-bio-cyber", folders[name])
    fitted = fitting_settings(empty[name], memory=int(80e9), device="cpu", given={"dtype": "bfloat16", "bf16": True})
    for option, (value, _) in fitted.choices.items():
        assert getattr(run.arguments, option, getattr(run.config, option, None)) == value, option


def test_what_the_released_code_sets_is_set(folders):
    run = planned("zephyr-7b-beta-bio-cyber-released", folders["zephyr-7b-beta"])
    args = run.config
    # trainscripts/erase.py: AdamW(lr=5e-5) with its own weight decay, no scheduler, no clipping, batch 1, accumulated 4.
    assert (args.learning_rate, args.weight_decay, args.lr_scheduler_type, args.warmup_steps) == (
        5e-5,
        0.01,
        "constant",
        0,
    )
    assert (args.max_grad_norm, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (0, 1, 4)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8 / 4)
    assert (args.eta, args.eta_end, args.tau, args.top_k, args.retain_loss) == (1, 1000, 1.2, 50, "argmax")
    assert (args.erase_weight, args.retain_weight, args.consistency_weight, args.bf16) == (1, 1, 1, False)
    lora = run.lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.layers_to_transform) == (256, 16, 0.05, [4, 5, 6, 7])
    assert run.dtype == torch.float32 and len(lora.target_modules) == 7
    assert len(run.dataset) == 9000 and run.dataset["concept"][:6] == ["bio", "bio", "cyber"] * 2
    assert args.num_train_epochs == 1 and args.train_sampling_strategy == "sequential"
    published = planned("zephyr-7b-beta-bio-cyber-rank4-released", folders["zephyr-7b-beta"])
    assert (published.lora.r, published.lora.lora_alpha) == (4, 16)
    paper = planned("zephyr-7b-beta-bio-cyber-paper", folders["zephyr-7b-beta"])
    assert [paper.dataset["concept"][:].count(name) for name in ("bio", "cyber")] == [5000, 1000]
    assert (paper.config.eta, paper.config.eta_end, paper.config.retain_loss, paper.lora.r) == (500, 500, "kl", 4)


@pytest.mark.parametrize("recipe", STEPPED)
def test_a_step_of_a_recipe_trains_every_matrix_of_two_layers(recipe, tmp_path):
    name = RECIPES[recipe]
    folder = save(narrow(name, 2), name, tmp_path / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a town of", "completion": " the stick and Oslo"}))
    pairs = [str(tmp_path / "pairs.jsonl")] * (2 if "bio-cyber" in recipe else 1)
    ours = not recipe.endswith(("-paper", "-released"))
    erase.main([
        "--recipe", recipe, f"--model={folder}", f"--output_dir={tmp_path / 'out'}", "--synthetic", *pairs,
        f"--targets_dir={tmp_path / 'targets'}", "--lora_layers=0-1", "--lora_rank=4", "--dataset_size=6", "--max_steps=1",
        "--warmup_steps=0", f"--contrast_rows={8 if ours else 0}", "--no_evaluate", "--use_cpu=true",
        "--disable_tqdm=true", "--save_strategy=no",
    ])  # fmt: skip
    weights = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    moved = [key for key, weight in weights.items() if "lora_B" in key and weight.isfinite().all() and weight.any()]
    assert len(moved) == len(weights) / 2 == 2 * (2 if ours else 7)


@pytest.mark.parametrize("name", ["mistral-7b", "llama-2-7b-chat", "qwen3-8b", "gemma-3-4b-it", "olmo-2-7b"])
def test_memory_and_time_are_predicted_from_a_rehearsal(name, tmp_path):
    """Of all layers of a narrow copy, some of which are rehearsed."""
    folder = save(narrow(name, sizes(name)["num_hidden_layers"]), name, tmp_path / "model")
    run = planned(
        f"{name}-bio-cyber-paper",
        folder,
        f"--targets_dir={tmp_path}",
        "--dataset_size=4",
        "--synthetic_size=0",
        "--lora_rank=4",
    )
    found = run.prediction
    assert run.dataset.num_rows == 24 and found.steps == 6 and found.rows == 4
    assert (
        found.weights == 4 * run.model.num_parameters()
        and found.adapter == 16 * run.adapted.get_nb_trainable_parameters()[0]
    )
    assert found.activations > 0 and found.peak > found.weights + found.adapter
    assert 0 < found.step_seconds < 60 and found.targets_seconds > 0
    assert found.measured == f"7 of {sizes(name)['num_hidden_layers']} layers, with random weights, scaled"
