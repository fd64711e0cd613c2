import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from elm_trainer import read_report
from elm_trainer.cli.main import main
from elm_trainer.hub.export import shrink_adapter
from elm_trainer.hub.load import load_erased

from .published import adapt, logits, seal, write_published


@pytest.fixture
def saved(base_folder, tmp_path):
    """Save an adapter of the base, and give its folder with the model."""

    def save(**settings):
        model = adapt(AutoModelForCausalLM.from_pretrained(base_folder), **settings)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter", model

    return save


def updates(model):
    """The update of each module as PEFT adds it, in float64."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 6, "lora_alpha": 12},
        {"r": 9, "lora_alpha": 4, "use_rslora": True},
        {
            "r": 4,
            "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"q_proj": 3, "v_proj": 11},
        },
        {"r": 5, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"r": 5, "target_modules": ["embed_tokens", "down_proj"]},
        {"r": 40, "target_modules": ["q_proj", "k_proj"]},  # more than the matrices have columns
        {"r": 3, "target_modules": r".*\.q_proj", "modules_to_save": ["norm"]},
    ],
)
def test_a_rank_that_is_enough_gives_the_same_model(settings, saved, tmp_path):
    folder, model = saved(**settings)
    shrunk = shrink_adapter(folder, 64, tmp_path / "small")
    again, _ = load_erased(tmp_path / "small")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert shrunk.kept == pytest.approx(1.0, abs=1e-12) and set(shrunk.modules) == set(updates(model))
    config = again.peft_config["default"]
    assert config.r == config.lora_alpha == shrunk.rank == shrunk.rank_before
    assert not config.rank_pattern and not config.alpha_pattern and not config.use_rslora


@pytest.mark.parametrize("settings", [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 30}}])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_is_that_of_the_singular_values_left_out(rank, settings, saved, tmp_path):
    folder, model = saved(r=8, **settings)
    shrunk = shrink_adapter(folder, rank, tmp_path / "small")
    before, after = updates(model), updates(load_erased(tmp_path / "small")[0])
    assert len(before) == 14
    lost = whole = 0.0
    for name, update in before.items():
        squares = torch.linalg.svdvals(update).square()
        error = (update - after[name]).square().sum()
        assert torch.allclose(error, squares[rank:].sum(), rtol=1e-4)
        assert shrunk.modules[name] == pytest.approx(float(squares[:rank].sum() / squares.sum()), rel=1e-5)
        assert torch.linalg.matrix_rank(after[name], rtol=1e-5) == rank
        lost, whole = lost + error, whole + squares.sum()
    assert shrunk.kept == pytest.approx(1 - float(lost / whole), abs=1e-5) and 0.1 < shrunk.kept < 0.9
    assert (shrunk.rank_before, shrunk.rank) == (8, rank)
    assert json.loads((tmp_path / "small" / "shrink.json").read_text())["modules"] == shrunk.modules


def test_modules_of_one_dimension_swapped_are_shrunk_too(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    model = adapt(base, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "adapter")
    shrink_adapter(tmp_path / "adapter", 2, tmp_path / "small")
    model.load_adapter(tmp_path / "small", "small")
    for module in (module for module in model.modules() if hasattr(module, "get_delta_weight")):
        before, after = (module.get_delta_weight(name).double() for name in ("default", "small"))
        squares = torch.linalg.svdvals(before).square()
        assert torch.allclose((before - after).square().sum(), squares[2:].sum(), rtol=1e-4)


def test_what_is_not_a_product_of_factors_is_copied_and_evidence_is_not(base_folder, tokenizer, tmp_path):
    model = adapt(AutoModelForCausalLM.from_pretrained(base_folder), modules_to_save=["norm"])
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "modules_to_save" in name).mul_(1.5)
    folder = write_published(model, tokenizer, tmp_path / "published", base_folder)
    tokenizer.save_pretrained(folder)
    (folder / "erasure_run.json").write_text('{"method": "ElmTrainer"}')
    seal(folder)
    shrink_adapter(folder, 2, tmp_path / "small")
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"tokenizer.json", "erasure_run.json"} < names and not {"erasure.json", "report.json"} & names
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "small"))
    kept = [key for key in before if "lora_" not in key]
    assert kept and all(torch.equal(before[key], after[key]) for key in kept) and before.keys() == after.keys()


def test_an_update_of_zeros_stays_one(base_folder, tmp_path):
    model = adapt(AutoModelForCausalLM.from_pretrained(base_folder), std=0.0)
    model.save_pretrained(tmp_path / "adapter")
    shrunk = shrink_adapter(tmp_path / "adapter", 2, tmp_path / "small")
    assert shrunk.kept == 1 and set(shrunk.modules.values()) == {1.0}
    assert all(not update.any() for update in updates(load_erased(tmp_path / "small")[0]).values())


def test_the_type_of_the_weights_is_kept(saved, tmp_path):
    folder, _ = saved()
    path = folder / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    shrink_adapter(folder, 2, tmp_path / "small")
    assert {value.dtype for value in load_file(tmp_path / "small" / path.name).values()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_more_than_two_factors_are_refused_with_the_fix(settings, saved, tmp_path):
    folder, _ = saved(**settings)
    with pytest.raises(ValueError, match=f"has `{next(iter(settings))}` True.*more than a product.*`merge_erased`"):
        shrink_adapter(folder, 2, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_an_adapter_without_lora_has_nothing_to_shrink(base_folder, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    (tmp_path / "adapter").mkdir()
    config.save_pretrained(tmp_path / "adapter")
    save_file(
        {"base_model.model.model.norm.weight": torch.ones(2)}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="holds no factors of LoRA"):
        shrink_adapter(tmp_path / "adapter", 2, tmp_path / "small")


def test_values_that_are_no_numbers_are_refused(saved, tmp_path):
    folder, _ = saved()
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds values in .* that are not finite"):
        shrink_adapter(folder, 2, tmp_path / "small")


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ValueError, "`rank` is 0: it must be at least 1"),
        (True, TypeError, "`rank` is True"),
        (2.0, TypeError, "2.0"),
    ],
)
def test_a_rank_that_is_none_is_refused(rank, error, message, tmp_path):
    with pytest.raises(error, match=message):
        shrink_adapter(tmp_path, rank, tmp_path / "small")


def test_nothing_is_overwritten(saved, tmp_path):
    folder, _ = saved()
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="`output_dir` .*adapter is not an empty folder"):
        shrink_adapter(folder, 2, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_the_command_measures_what_shrinking_costs(saved, base_folder, tmp_path, capsys, monkeypatch):
    saved(r=4)
    monkeypatch.setenv("COLUMNS", "200")
    main(
        ["shrink", "--adapter", str(tmp_path / "adapter"), "--rank", "2", "--evaluate", "--model", str(base_folder)]
        + ["--questions", "4", "--measures", "multiple-choice", "specificity"]
    )
    printed = capsys.readouterr().out
    small = tmp_path / "adapter-rank-2"
    share = json.loads((small / "shrink.json").read_text())["kept"]
    assert f"Rank 4 -> 2: {share:.1%} of the squared norm" in printed and "What shrinking costs" in printed
    before, after = (
        read_report(tmp_path / "adapter-rank-2-evaluation" / side / "report.json") for side in ("before", "after")
    )
    assert before["reference_sha256"] == after["reference_sha256"]
    assert before["erased_sha256"] != after["erased_sha256"]
    values = [report["figures"]["retention.perplexity"]["erased"]["value"] for report in (before, after)]
    assert values[0] != values[1] and all(f"{value:.3f}" in printed for value in values)
