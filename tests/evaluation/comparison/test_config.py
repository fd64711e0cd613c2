from pathlib import Path

import pytest
from trl import TrlParser

from elm_trainer.comparison.config import METHODS, ComparisonConfig
from elm_trainer.modeling import lora_config


ROOT = Path(__file__).parents[3]
GRID = [{"learning_rate": 1e-3}]


def config(**fields):
    return ComparisonConfig(**({"methods": {"elm": {"grid": GRID}, "rmu": {"grid": GRID}}} | fields))


def test_the_recipe_compares_all_methods_with_as_many_settings_and_three_seeds(monkeypatch):
    monkeypatch.chdir(ROOT)
    [recipe] = TrlParser((ComparisonConfig,)).parse_args_and_config(
        ["--config", "recipes/compare-smollm2-135m.yaml", "--updates", "5"]
    )
    assert list(recipe.methods) == list(METHODS) and recipe.updates == 5
    assert {len(recipe.settings(method).grid) for method in METHODS} == {2} and len(recipe.seeds) >= 3


def test_every_method_has_the_same_schedule_batch_and_seed():
    both = config(training={"per_device_train_batch_size": 3})
    for method in ("elm", "rmu"):
        args = both.arguments(method, 0, seed=7, output_dir="out", max_steps=9)
        assert (args.lr_scheduler_type, args.per_device_train_batch_size, args.seed, args.max_steps) == (
            "constant_with_warmup", 3, 7, 9
        )  # fmt: skip


def test_an_adapter_is_the_shared_one_but_for_what_a_method_needs(tiny_model):
    both = config(
        lora_rank=4,
        lora_layers="1-2",
        lora_targets="down_proj",
        methods={"elm": {"grid": GRID}, "rmu": {"grid": GRID, "lora": {"layers": "0"}}},
    )
    for method, layers in (("elm", [1, 2]), ("rmu", [0])):
        lora = lora_config(tiny_model, **both.lora_shape(method))
        assert (lora.r, lora.layers_to_transform) == (4, layers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": {"elm": {"grid": GRID}, "gold": {"grid": GRID}}}, "gold.*do not exist; use: elm, rmu"),
        ({"methods": {"elm": {"grid": GRID}, "rmu": {"grid": GRID * 2}}}, "'elm': 1, 'rmu': 2.*same number"),
        ({"methods": {"elm": {"grid": []}}}, "at least one"),
        ({"methods": {"rmu": {"grid": GRID}}}, "`clock` is 'elm', which is not compared"),
        ({"methods": {"elm": {"grid": [{"max_steps": 100}]}}}, "sets \\['max_steps'\\], which all methods share"),
        ({"methods": {"elm": {"grid": [{"eta": -1.0}]}}}, "`methods.elm`, setting 0: .*`eta` is -1.0"),
        ({"methods": {"elm": {"grid": [{"steering_scale": 1.0}]}}}, "`methods.elm`, setting 0: .*steering_scale"),
        ({"methods": {"elm": {"grid": GRID, "grids": GRID}}}, "it has a grid, fixed, lora and updates"),
        ({"methods": {"elm": {"grid": GRID, "updates": 0}}}, "`methods.elm.updates` is 0: it must be at least 1"),
        ({"methods": {"elm": {"grid": GRID, "lora": {"alpha": 2}}}}, "it takes: rank, layers, targets"),
        ({"lora_layers": "first"}, "`lora_layers` is 'first'"),
        ({"seeds": []}, "`seeds` is"),
        ({"seeds": [0, 0]}, "each once"),
        ({"search_seed": 1}, "`search_seed` is 1, one of `seeds`"),
        ({"updates": 0}, "`updates` is 0"),
        ({"ladder": "nowhere.yaml"}, "nowhere.yaml"),
        (
            {"concept": "dyes"},
            "`concept` is 'dyes', about which no questions are built in.*give a `bank`, and `forget`",
        ),
        ({"concept": "dyes", "bank": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_runs(fields, message):
    with pytest.raises((ValueError, OSError), match=message):
        config(**fields)
