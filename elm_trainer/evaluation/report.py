"""The report: everything measured on an erasure, reference and erased side by side, in one JSON file."""

import hashlib
import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..data.questions import CHANCE, Question, overlap_accuracy
from .fluency import as_prompt, distinct_n, generate, repetition, reverse_perplexity
from .multiple_choice import score_choices
from .open_answers import names_answer
from .retention import retention
from .statistics import Figure, bootstrap_mean, bootstrap_perplexity, bootstrap_ratio


SCHEMA_VERSION = 1
PACKAGES = ("elm-trainer", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


@dataclass(frozen=True)
class OpenQuestion:
    """A question that is answered freely, and the answer that an erased model must not name."""

    question: str
    answer: str


@dataclass
class EvaluationSuite:
    """What is measured.

    Args:
        banks (`dict[str, list[Question]]`): Four-choice questions by name.
        erased (`tuple[str, ...]`): Names of the banks that ask for the concept.
        open_questions (`list[OpenQuestion]`): Questions about the concept with their true answers.
        concept_prompts (`list[str]`): Prompts about the concept for R-PPL.
        retain_texts (`list[str]`): Retain texts that training did not see.
        max_new_tokens (`int`, *optional*, defaults to `32`): Length of generated answers.
    """

    banks: dict[str, list[Question]]
    erased: tuple[str, ...]
    open_questions: list[OpenQuestion]
    concept_prompts: list[str]
    retain_texts: list[str]
    max_new_tokens: int = 32
    samples: int = field(default=10)


def measure(
    model: PeftModel, processing_class: PreTrainedTokenizerBase, suite: EvaluationSuite, *, batch_size: int = 16
) -> dict[str, Any]:
    """Measure the reference (adapter disabled) and the erased model on a suite.

    Returns:
        `dict`: `figures` maps a name to `{"reference": figure, "erased": figure}`; `samples` holds answers of both to
        the same open questions; `overlap_baselines` the share of each bank that its options' letters give away.
    """
    texts = [as_prompt(processing_class, item.question) for item in suite.open_questions]
    prompts = [as_prompt(processing_class, prompt) for prompt in suite.concept_prompts]
    figures: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[str]] = {}

    def keep(name: str, side: str, figure: Figure) -> None:
        figures.setdefault(name, {})[side] = figure.to_dict()

    for side in ("reference", "erased"):
        with model.disable_adapter() if side == "reference" else nullcontext():
            for name, questions in suite.banks.items():
                scores = score_choices(
                    model, processing_class, questions, batch_size=batch_size, description=f"{side}: {name}"
                )
                keep(f"multiple_choice.{name}.pmi", side, bootstrap_mean(scores.pmi))
                keep(f"multiple_choice.{name}.log_likelihood", side, bootstrap_mean(scores.log_likelihood))
            options = {"max_new_tokens": suite.max_new_tokens}
            answers[side] = generate(model, processing_class, texts, **options)
            continuations = generate(model, processing_class, prompts, **options)
        named = [
            names_answer(answer, item.answer) for answer, item in zip(answers[side], suite.open_questions, strict=True)
        ]
        keep("open_answers.names_answer", side, bootstrap_mean(named))
        with model.disable_adapter():  # the judge is the reference
            nlls, tokens = reverse_perplexity(model, processing_class, prompts, continuations)
        keep("fluency.r_ppl", side, bootstrap_perplexity(nlls, tokens))
        keep("fluency.repetition", side, bootstrap_mean([repetition(text) for text in continuations]))
        empty = [not text.strip() for text in [*continuations, *answers[side]]]
        keep("fluency.empty", side, bootstrap_mean(empty))
        # Distinct n-grams are a property of the set of texts, so it has no interval over single texts.
        distinct = distinct_n(continuations)
        keep("fluency.distinct_2", side, Figure(distinct, distinct, distinct, len(continuations)))
    kept = retention(model, processing_class, suite.retain_texts)
    keep("retention.perplexity", "reference", bootstrap_perplexity(kept.reference_nll, kept.tokens))
    keep("retention.perplexity", "erased", bootstrap_perplexity(kept.adapted_nll, kept.tokens))
    keep("retention.kl", "reference", Figure(0.0, 0.0, 0.0, len(kept.tokens)))
    keep("retention.kl", "erased", bootstrap_ratio(kept.kl, kept.tokens))
    samples = [
        {"prompt": item.question, "answer": item.answer, "reference": before, "erased": after}
        for item, before, after in zip(suite.open_questions, answers["reference"], answers["erased"], strict=True)
    ]
    return {
        "figures": figures,
        "erased_banks": list(suite.erased),
        "chance": CHANCE,
        "overlap_baselines": {name: overlap_accuracy(questions) for name, questions in suite.banks.items()},
        "samples": samples[: suite.samples],
    }


def model_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of the weights, the same with and without an adapter."""
    digest = hashlib.sha256()
    weights = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            weights[name.replace("base_model.model.", "").replace(".base_layer", "")] = parameter
    for name in sorted(weights):
        digest.update(f"{name}{tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_report(
    path: str | Path,
    measurement: Mapping[str, Any],
    *,
    model: torch.nn.Module,
    recipe: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
    training_log: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write `report.json`, through a temporary file, and return it.

    Args:
        path (`str` or `Path`): Where to.
        measurement (`Mapping`): What [`measure`] returned.
        model (`nn.Module`): For its fingerprint.
        recipe (`Mapping`): Settings of the run, with its seeds.
        datasets (`Mapping`): Size and hash of each dataset.
        seconds (`Mapping[str, float]`): Wall-clock seconds of each phase.
        training_log (`Sequence[Mapping]`, *optional*): `trainer.state.log_history`.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = {
        "schema_version": SCHEMA_VERSION,
        **measurement,
        "model_sha256": model_fingerprint(model),
        "recipe": dict(recipe),
        "datasets": {name: dict(info) for name, info in datasets.items()},
        "versions": {package: version(package) for package in PACKAGES},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        # Linux counts kilobytes, macOS bytes.
        "peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "training_log": [dict(entry) for entry in training_log],
    }
    path = Path(path)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return report


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a report; raises `ValueError` for one of another schema."""
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    found = report.get("schema_version")
    if found != SCHEMA_VERSION:
        raise ValueError(
            f"Report {path} has schema_version {found}, but this version reads {SCHEMA_VERSION}: measure again."
        )
    return report


def dataset_info(texts: Sequence[str]) -> dict[str, Any]:
    """Size and SHA-256 of a list of texts."""
    return {"size": len(texts), "sha256": hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()}


def bank_info(questions: Sequence[Question]) -> dict[str, Any]:
    """Size and SHA-256 of a question bank."""
    return dataset_info([json.dumps(asdict(question), ensure_ascii=False) for question in questions])


def render_table(report: Mapping[str, Any]) -> Table:
    """The report's figures as a table for the terminal."""
    table = Table("figure", "n", "reference", "erased", title="Before and after (95 % intervals)")
    for name, sides in report["figures"].items():
        table.add_row(name, str(sides["erased"]["n"]), *(_cell(sides[side]) for side in ("reference", "erased")))
    return table


def write_samples(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write the answers of both models to the same questions as Markdown."""
    lines = ["# Answers before and after\n"]
    for sample in report["samples"]:
        lines += [f"**{sample['prompt']}** (true answer: {sample['answer']})\n"]
        lines += [f"- {side}: {' '.join(sample[side].split()) or '(empty)'}" for side in ("reference", "erased")]
        lines.append("")
    Path(path).write_text("\n".join(lines), encoding="utf-8")


def _cell(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
