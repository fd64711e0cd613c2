"""Erase a concept from a causal language model, and measure how well. Nothing heavy is imported before it is used."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_EXPORTS = {
    "BaseModel": ".hub.info",
    "CardDetails": ".hub.publish",
    "Concept": ".concept",
    "ConceptSources": ".data.sources",
    "ElmConfig": ".methods.elm",
    "ElmDataCollator": ".data.collator",
    "ElmTrainer": ".methods.elm",
    "ErasureEvaluationCallback": ".evaluation.callback",
    "ErasureTrainer": ".methods.base",
    "EvaluationSuite": ".evaluation.suite",
    "GradDiffConfig": ".methods.likelihood",
    "GradDiffTrainer": ".methods.likelihood",
    "ModelPair": ".evaluation.pair",
    "NonFiniteLossError": ".methods.forward",
    "NpoConfig": ".methods.likelihood",
    "NpoTrainer": ".methods.likelihood",
    "PublishOptions": ".hub.publish",
    "RepNoiseConfig": ".methods.repnoise",
    "RepNoiseTrainer": ".methods.repnoise",
    "RmuConfig": ".methods.rmu",
    "RmuTrainer": ".methods.rmu",
    "SimNpoConfig": ".methods.likelihood",
    "SimNpoTrainer": ".methods.likelihood",
    "SynthesisConfig": ".checks",
    "WhpConfig": ".methods.whp",
    "WhpTrainer": ".methods.whp",
    "attack_erasure": ".attacks",
    "build_erasure_dataset": ".data.sources",
    "built_in_suite": ".evaluation.suite",
    "compare_reports": ".evaluation.report",
    "counterfactuals": ".methods.anchors",
    "evaluate_erasure": ".evaluation.evaluate",
    "export_gguf": ".hub.export",
    "export_gguf_adapter": ".hub.export",
    "find_readout": ".methods.placement",
    "load_bank": ".data.facts",
    "load_concept": ".concept",
    "load_erased": ".hub.load",
    "load_model_and_tokenizer": ".modeling",
    "load_texts": ".data.sources",
    "merge_erased": ".hub.load",
    "publish_adapter": ".hub.publish",
    "publish_dataset": ".hub.publish",
    "read_questions": ".data.questions",
    "read_report": ".evaluation.report",
    "shrink_adapter": ".hub.export",
    "stack_erasures": ".hub.load",
    "synthesize_completions": ".synthesis",
}
__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from .attacks import attack_erasure
    from .checks import SynthesisConfig
    from .concept import Concept, load_concept
    from .data.collator import ElmDataCollator
    from .data.facts import load_bank
    from .data.questions import read_questions
    from .data.sources import ConceptSources, build_erasure_dataset, load_texts
    from .evaluation.callback import ErasureEvaluationCallback
    from .evaluation.evaluate import evaluate_erasure
    from .evaluation.pair import ModelPair
    from .evaluation.report import compare_reports, read_report
    from .evaluation.suite import EvaluationSuite, built_in_suite
    from .hub.export import export_gguf, export_gguf_adapter, shrink_adapter
    from .hub.info import BaseModel
    from .hub.load import load_erased, merge_erased, stack_erasures
    from .hub.publish import CardDetails, PublishOptions, publish_adapter, publish_dataset
    from .methods.anchors import counterfactuals
    from .methods.base import ErasureTrainer
    from .methods.elm import ElmConfig, ElmTrainer
    from .methods.forward import NonFiniteLossError
    from .methods.likelihood import GradDiffConfig, GradDiffTrainer, NpoConfig, NpoTrainer, SimNpoConfig, SimNpoTrainer
    from .methods.placement import find_readout
    from .methods.repnoise import RepNoiseConfig, RepNoiseTrainer
    from .methods.rmu import RmuConfig, RmuTrainer
    from .methods.whp import WhpConfig, WhpTrainer
    from .modeling import load_model_and_tokenizer
    from .synthesis import synthesize_completions


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)


def loading_objection(config: dict[str, Any]) -> str | None:
    """Why [`load_erased`] would refuse an adapter whose `adapter_config.json` holds this; `None` if it would not.

    It is here for the trainers, which lie below `hub` and import nothing of it.
    """
    from .hub.errors import UnsafeAdapterError
    from .hub.safety import check_adapter_config

    try:
        check_adapter_config(config, Path("peft_config"))
    except UnsafeAdapterError as error:
        return str(error)
    return None


def __dir__() -> list[str]:
    return __all__
