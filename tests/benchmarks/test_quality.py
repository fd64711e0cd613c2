from dataclasses import replace

import pytest
import torch

from benchmarks.quality import OURS, RELEASED, Recipe, train_ours, train_released
from benchmarks.shapes import Adapter, ModelShape


@pytest.fixture(autouse=True)
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    ModelShape(16, 32, 2, 2, 1, len(tokenizer)).model(tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small(recipe: Recipe, model: str) -> Recipe:
    overrides = {"model": model, "dataset_size": 6, "max_steps": 2, "lora_layers": "0-1", "lora_rank": 2}
    overrides |= {"per_device_train_batch_size": 3, **recipe.overrides}
    return replace(recipe, overrides=overrides)


def test_recipes_are_read_as_they_stand(tmp_path):
    config = OURS.config(str(tmp_path))
    assert (config.novice, config.log_tokens, config.per_device_train_batch_size) == ("counterfactual", 8, 10)
    assert OURS.adapter() == Adapter(64, tuple(range(12, 25)), alpha=64, targets=("gate_proj", "up_proj"))
    released = RELEASED.config(str(tmp_path))
    assert (released.eta, released.eta_end, released.tau) == (1.0, 1000.0, 1.2)


@pytest.mark.parametrize("side", ["ours", "released"])
def test_training_reports_its_set_up_its_seconds_and_both_accuracies(side, model_folder, paced, tmp_path):
    pacer, reports = paced(2)
    if side == "ours":
        train_ours(pacer, str(tmp_path), small(OURS, model_folder), questions=2)
    else:
        train_released(pacer, str(tmp_path), small(RELEASED, model_folder), questions=2)

    ready, block = reports()
    assert sum(ready["setup"].values()) > 0
    assert block["seconds"] > 0
    assert {block["capitals"], block["geography"]} <= {0.0, 0.5, 1.0}
