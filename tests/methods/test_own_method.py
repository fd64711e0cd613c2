"""The method of the README's "add your own", held to the contract of all methods."""

import math
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch

from elm_trainer import NpoConfig
from examples.own_method import MaxEntropyConfig, MaxEntropyTrainer, kl_to_uniform

from .methods import Method
from .test_contract import *  # noqa: F403


del test_one_and_two_processes_report_the_same_terms  # noqa: F821 (it runs the listed methods by name)


@pytest.fixture
def method():
    return Method(MaxEntropyTrainer, MaxEntropyConfig, ("erase", "retain"))


def test_it_fits_into_sixty_lines():
    assert len((Path(__file__).parents[2] / "examples" / "own_method.py").read_text().splitlines()) <= 60


def test_divergence_from_uniform_is_nothing_for_equal_logits_and_log_of_the_vocabulary_for_certainty():
    logits = torch.tensor([[2.0] * 8, [1e4] + [0.0] * 7], requires_grad=True)
    divergence = kl_to_uniform(logits, slice(None))
    divergence.sum().backward()
    assert divergence.tolist() == pytest.approx([0.0, math.log(8)], abs=1e-6)
    assert logits.grad.abs().max() < 1e-6


def test_forget_text_becomes_less_certain(tiny_model, tokenizer, dataset, settings, lora):
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight.mul_(30)
    args = settings(MaxEntropyConfig, max_steps=8, erase_weight=1.0)
    trainer = MaxEntropyTrainer(tiny_model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    logged = [entry["erase_loss"] for entry in trainer.state.log_history if "erase_loss" in entry]
    assert logged[-1] < 0.9 * logged[0]


def test_a_config_may_name_types_that_are_there_for_checkers_alone(tmp_path, monkeypatch):
    (tmp_path / "own_config.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import TYPE_CHECKING\n"
        "from elm_trainer import ElmConfig\nif TYPE_CHECKING:\n    from pathlib import PurePath\n"
        "@dataclass\nclass OwnConfig(ElmConfig):\n    notes: PurePath | None = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = import_module("own_config").OwnConfig

    config(str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="`retain_weight` is -1"):
        config(str(tmp_path), report_to="none", retain_weight=-1.0)


def test_rules_of_a_config_add_to_those_of_its_parent(tmp_path):
    @dataclass
    class OwnConfig(NpoConfig):
        gain: float = 1.0
        _rules = {"above 0": ("gain",)}

    for name in ("beta", "gain"):
        with pytest.raises(ValueError, match=f"`{name}` is 0.0: it must be above 0"):
            OwnConfig(str(tmp_path), report_to="none", **{name: 0.0})
