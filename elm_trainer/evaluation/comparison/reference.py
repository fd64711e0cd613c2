"""What all runs of a comparison share, made once for all of them."""

from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...modeling import load_tokenizer
from ..pair import ModelPair
from ..report import PACKAGES, dataset_info, model_fingerprint, suite_info
from ..suite import EvaluationSuite
from .bench import Bench, suite_of, to_json
from .config import ComparisonConfig
from .runs import Runs


SPLITS = ("dev", "test")


@dataclass(frozen=True)
class Reference:
    """The tokenizer, what is asked, and what the reference answers.

    Attributes:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        suites (`dict[str, EvaluationSuite]`): What is asked, by split.
        items (`dict[str, dict]`): The reference's items by split, as JSON holds them.
        versions (`dict[str, str]`): Versions of packages.
        model (`str`): SHA-256 of the weights.
        data (`dict[str, dict]`): Size and SHA-256 of the training texts, by seed.
        questions (`dict[str, dict]`): The same of what is asked, by split.
    """

    processing_class: PreTrainedTokenizerBase
    suites: dict[str, EvaluationSuite]
    items: dict[str, dict[str, Any]]
    versions: dict[str, str]
    model: str
    data: dict[str, dict[str, Any]]
    questions: dict[str, dict[str, Any]]

    def identity(self, split: str) -> dict[str, Any]:
        """What figures of a split depend on, beside how a model was trained."""
        return {"versions": self.versions, "model": self.model, "questions": self.questions[split]}


def measure_reference(config: ComparisonConfig, runs: Runs) -> Reference:
    """Make what is shared; the reference is measured unless that is finished."""
    bench = Bench(config, load_tokenizer(config.model))
    suites = {split: suite_of(config, split) for split in SPLITS}
    texts = {seed: bench.dataset(seed) for seed in (*config.seeds, config.search_seed)}
    found = Reference(
        bench.processing_class,
        suites,
        {},
        {package: version(package) for package in PACKAGES},
        model_fingerprint(bench.model),
        {
            str(seed): {name: dataset_info(rows[name]) for name in ("forget", "retain", "prompt", "completion")}
            for seed, rows in texts.items()
        },
        {
            split: suite_info(suite)
            | {"answers": {"tokens": suite.answer_tokens, "fluency tokens": suite.max_new_tokens}}
            for split, suite in suites.items()
        },
    )

    def measure(split: str) -> dict[str, Any]:
        return to_json(bench.measure(ModelPair(bench.model, bench.model), suites[split], "reference"))

    for split in SPLITS:
        found.items[split] = runs.once(f"reference-{split}", found.identity(split), partial(measure, split))
    return found
