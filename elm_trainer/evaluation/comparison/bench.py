"""The model that is erased, what it trains on, and how it is measured."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.dataset import ConceptSources, build_erasure_dataset
from ...modeling import load_model
from ..measures import MEASURES, Items, Setting
from ..pair import ModelPair, Side
from ..suite import EvaluationSuite, bank_size, built_in_suite
from .config import ComparisonConfig


MEASURED = ("multiple-choice", "open-answers", "cloze", "greedy-fluency", "specificity")
# Held-out texts of the retain set that belong to the dev split.
_DEV_TEXTS = 10


class Bench:
    """Model and data of a comparison, each made when it is first needed.

    Args:
        config ([`ComparisonConfig`]): Settings.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
    """

    def __init__(self, config: ComparisonConfig, processing_class: PreTrainedTokenizerBase):
        self.config, self.processing_class = config, processing_class

    @cached_property
    def model(self) -> PreTrainedModel:
        """The reference. A run that adapts it takes its adapter off again."""
        model = load_model(self.config.model, dtype=self.config.dtype)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def dataset(self, seed: int) -> Dataset:
        """What every method trains on with this seed."""
        config = self.config
        sources = ConceptSources(config.forget or config.concept, list(config.retain), config.synthetic or [])
        return build_erasure_dataset(
            {config.concept: sources}, size=config.dataset_size, processing_class=self.processing_class, seed=seed
        )

    def measure(self, pair: ModelPair, suite: EvaluationSuite, side: Side) -> dict[str, Items]:
        """All figures of one side of a pair."""
        setting = Setting(pair, self.processing_class, suite, {}, temperature=0.0, batch_size=16, seed=0)
        items: dict[str, Items] = {}
        for name in MEASURED:
            items |= MEASURES[name](setting, side)
        return {name: found for name, found in items.items() if not name.endswith(".removed")}


def suite_of(config: ComparisonConfig, split: str) -> EvaluationSuite:
    """What is asked in the `"dev"` or the `"test"` split: no question, prompt or text is in both."""
    count = config.questions if split == "test" else config.dev_questions
    prompts = max(1, round(config.prompts * count / config.questions))
    # A third as many prompts as questions are drawn; what is beyond the size of the comparison is cut off.
    own = config.own_questions(split)
    banks = None if own is None else {config.concept: own}
    suite = built_in_suite([config.concept], max(count, 3 * prompts), split=split, banks=banks)
    half = max(1, count // 2)
    suite.concept_prompts = suite.concept_prompts[:prompts]
    suite.banks = {
        name: bank[: max(1, bank_size(count, suite.roles[name], bank[0].family))] for name, bank in suite.banks.items()
    }
    # Free answers take long, and those about anything but the concept have no bound.
    erased = suite.named("erased")
    suite.open_questions = {name: asked[:half] for name, asked in suite.open_questions.items() if name in erased}
    suite.cloze = {name: asked[:half] for name, asked in suite.cloze.items() if name in erased}
    suite.retain_texts = suite.retain_texts[:_DEV_TEXTS] if split == "dev" else suite.retain_texts[_DEV_TEXTS:]
    suite.forget_texts = []
    return suite


def to_json(items: Mapping[str, Items]) -> dict[str, Any]:
    """Items as JSON holds them."""
    return {name: asdict(found) for name, found in items.items()}


def from_json(items: Mapping[str, Any]) -> dict[str, Items]:
    """Items that JSON held."""
    return {name: Items(**found) for name, found in items.items()}
