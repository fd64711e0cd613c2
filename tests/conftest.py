import os

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from elm_trainer.modeling import DEMO_MODEL, load_tokenizer

from .no_skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401


# Where it is not told, DeepSpeed writes what it has found to the output of whatever imports it first.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(config, items):
    """A worker of pytest-xdist begins with the files that take minutes, so that none is left at the end."""
    if hasattr(config, "workerinput"):
        long = {item.path for item in items for name in ("slow", "distributed") if item.get_closest_marker(name)}
        items.sort(key=lambda item: item.path not in long)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(autouse=True)
def own_targets(tmp_path_factory, monkeypatch):
    """No test profits from what another has stored, nor do the processes that it starts."""
    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))


@pytest.fixture
def tiny_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_peft_model(tiny_model):
    torch.manual_seed(0)
    return get_peft_model(tiny_model, LoraConfig(r=4, target_modules="all-linear")).eval()
