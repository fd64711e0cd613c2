"""Erase a concept from a causal language model, and measure how well. Nothing heavy is imported before it is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_EXPORTS = {
    "Concept": ".concept",
    "ConceptSources": ".data.dataset",
    "ElmConfig": ".methods.elm",
    "ElmDataCollator": ".data.collator",
    "ElmTrainer": ".methods.elm",
    "ErasureTrainer": ".methods.base",
    "ErasureEvaluationCallback": ".evaluation.callback",
    "EvaluationSuite": ".evaluation.suite",
    "ModelPair": ".evaluation.pair",
    "NonFiniteLossError": ".methods.base",
    "SynthesisConfig": ".synthesis",
    "attack_erasure": ".evaluation.attacks",
    "build_erasure_dataset": ".data.dataset",
    "built_in_suite": ".evaluation.suite",
    "compare_reports": ".evaluation.compare",
    "evaluate_erasure": ".evaluation.evaluate",
    "load_bank": ".data.questions",
    "load_concept": ".concept",
    "load_model_and_tokenizer": ".modeling",
    "load_texts": ".data.sources",
    "read_questions": ".data.questions",
    "read_report": ".evaluation.report",
    "synthesize_completions": ".synthesis",
}
__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from .concept import Concept, load_concept
    from .data.collator import ElmDataCollator
    from .data.dataset import ConceptSources, build_erasure_dataset
    from .data.questions import load_bank, read_questions
    from .data.sources import load_texts
    from .evaluation.attacks import attack_erasure
    from .evaluation.callback import ErasureEvaluationCallback
    from .evaluation.compare import compare_reports
    from .evaluation.evaluate import evaluate_erasure
    from .evaluation.pair import ModelPair
    from .evaluation.report import read_report
    from .evaluation.suite import EvaluationSuite, built_in_suite
    from .methods.base import ErasureTrainer, NonFiniteLossError
    from .methods.elm import ElmConfig, ElmTrainer
    from .modeling import load_model_and_tokenizer
    from .synthesis import SynthesisConfig, synthesize_completions


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
