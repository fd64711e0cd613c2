from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elm_trainer.comparison.config import ComparisonConfig, measure_reference
from elm_trainer.comparison.run import MethodRun
from elm_trainer.files import Runs


@pytest.fixture(scope="session")
def checkpoint(tokenizer, tmp_path_factory):
    """A folder with a tiny random model and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(checkpoint, tmp_path):
    """Makes a comparison of seconds."""

    def make(**fields):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "model": checkpoint,
            "synthetic": "capitals-fluent",
            "dataset_size": 8,
            "lora_rank": 2,
            "training": {"per_device_train_batch_size": 4, "max_length": 32, "warmup_steps": 1},
            "updates": 2,
            "seeds": [0, 1],
            "questions": 4,
            "dev_questions": 4,
            "prompts": 2,
            "methods": {
                "elm": {"grid": [{"learning_rate": 1e-2}, {"learning_rate": 2e-2}]},
                "graddiff": {"grid": [{"learning_rate": 1e-2}, {"learning_rate": 2e-2}]},
            },
        }
        return ComparisonConfig(**(settings | fields))

    return make


@pytest.fixture(scope="session")
def reference_of():
    """The reference of a comparison; it is the same for all that ask the same of the same model."""
    found = {}

    def get(config):
        key = (config.model, tuple(config.seeds), config.questions, config.dev_questions, config.dataset_size)
        if key not in found:
            found[key] = measure_reference(config, Runs(config.output_dir + "/runs"))
        return found[key]

    return get


@pytest.fixture
def method_run(reference_of):
    """Makes the runs of a method, in this process."""

    def make(config, method, seconds=None):
        return MethodRun(config, method, Runs(config.output_dir + "/runs"), reference_of(config), seconds)

    return make


@pytest.fixture
def one_setting(tiny):
    """Makes a comparison without a search."""

    def make(**fields):
        config = tiny(**fields)
        return replace(
            config, methods={name: {**part, "grid": part["grid"][:1]} for name, part in config.methods.items()}
        )

    return make
