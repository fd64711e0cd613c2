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
    "EvaluationSuite": ".evaluation.report",
    "NonFiniteLossError": ".methods.base",
    "SynthesisConfig": ".synthesis",
    "build_erasure_dataset": ".data.dataset",
    "load_bank": ".data.questions",
    "load_concept": ".concept",
    "load_model_and_tokenizer": ".modeling",
    "load_texts": ".data.sources",
    "measure": ".evaluation.report",
    "read_report": ".evaluation.report",
    "synthesize_completions": ".synthesis",
    "write_report": ".evaluation.report",
}
__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from .concept import Concept, load_concept
    from .data.collator import ElmDataCollator
    from .data.dataset import ConceptSources, build_erasure_dataset
    from .data.questions import load_bank
    from .data.sources import load_texts
    from .evaluation.report import EvaluationSuite, measure, read_report, write_report
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
