"""The gold standard: an erased model beside one of the same making that was never taught the concept."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ks_2samp
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.invented import CONCEPT, RETAINED
from ..data.questions import CHANCE, Question, names_answer
from ..evaluation.fluency import as_prompt, generate, reverse_perplexity
from ..evaluation.journal import Journal
from ..evaluation.multiple_choice import score_choices
from ..evaluation.report import SCHEMA_VERSION, environment, read_report
from ..evaluation.statistics import Figure, bootstrap_mean, bootstrap_perplexity
from ..files import discard_unfinished, write_json
from ..run_lock import only_run_in
from .models import MODELS, GoldModels, GoldStandardConfig
from .relearning import SPLITS, compare_relearning, mean_by_subject, relearn


logger = logging.get_logger(__name__)
REPORT_FILE = "gold_standard.json"
_MAX_NEW_TOKENS = 8


def gold_standard(config: GoldStandardConfig | None = None, *, output_dir: str | Path) -> dict[str, Any]:
    """Train a small model with and without an invented concept, erase it from the first, and compare.

    Compared are the taught model, the never-taught one, the taught one erased by [`ElmTrainer`] and the taught one
    after plain gradient ascent: on every measure, and in how fast they learn the concept (again).

    Args:
        config ([`GoldStandardConfig`], *optional*):
            Settings.
        output_dir (`str` or `Path`):
            Where `gold_standard.json` goes. Models are kept in `models/` beside it and results stream to
            `gold_standard.partial.jsonl`, so that an interrupted run continues where it was and a repeated one only
            reads.

    Raises:
        FolderInUseError: if another run writes to `output_dir`.

    Returns:
        `dict`: `figures` by name and model; `curves` by split and model, rows of step, accuracy, low and high;
        `relearning` by split, as [`compare_relearning`] gives it; `ordering`, the model that relearns slowest first;
        `samples`, what each model answers when asked for the concept.
    """
    with only_run_in(output_dir):
        return _gold_standard(config or GoldStandardConfig(), Path(output_dir))


def _gold_standard(config: GoldStandardConfig, output_dir: Path) -> dict[str, Any]:
    discard_unfinished(output_dir / "models")
    models = GoldModels(config, output_dir / "models")
    identity = models.identity() | {"schema_version": SCHEMA_VERSION}
    path = output_dir / REPORT_FILE
    if path.exists():
        try:
            report = read_report(path, "gold-standard")
        except ValueError as error:
            logger.warning(f"{error} It is made anew.")
        else:
            if report.get("identity") == identity:
                return report
    journal = Journal(output_dir / "gold_standard.partial.jsonl", identity)
    seconds = {"training": 0.0, "measuring": 0.0, "relearning": 0.0}

    def once(phase: str, run: Callable[..., Any], **settings: str) -> dict[str, Any]:
        """What `run` gives for each of the models."""
        found = {}
        for name in MODELS:
            row = journal.once(phase, {"model": name, **settings}, partial(run, models, name, **settings))
            seconds[phase] += row["seconds"]
            found[name] = row["result"]
        return found

    once("training", GoldModels.prepare)
    measured = once("measuring", _measure)
    curves, relearning = {}, {}
    for split in SPLITS:
        results = once("relearning", relearn, split=split)
        curves[split], relearning[split] = compare_relearning(results, seed=models.config.seed)
    figures = {
        figure: {name: measured[name]["figures"][figure] for name in MODELS}
        for figure in measured[MODELS[0]]["figures"]
    }
    figures["forget_quality"] = {
        name: _forget_quality(measured[name]["truth_ratios"], measured["never-taught"]["truth_ratios"])
        for name in MODELS
    }
    report = {
        "schema_version": SCHEMA_VERSION,
        "kind": "gold-standard",
        "chance": CHANCE,
        "figures": figures,
        "curves": curves,
        "relearning": relearning,
        "ordering": relearning["all"]["ordering"],
        "samples": [
            {"prompt": question.text, "answer": question.answer}
            | {name: measured[name]["answers"][index] for name in MODELS}
            for index, question in enumerate(_one_of_each_fact(models, models.world.questions[CONCEPT]))
        ],
        "config": asdict(models.config),
        "identity": identity,
        **environment(seconds),
    }
    write_json(path, report)
    journal.close()
    return report


def _measure(models: GoldModels, name: str) -> dict[str, Any]:
    """Every measure of one model but relearning."""
    model, processing_class, world = models.load(name), models.processing_class, models.world
    figures: dict[str, Figure] = {}
    named: dict[str, list[float]] = {}
    right: dict[str, list[float]] = {}
    truth_ratios: list[float] = []
    answers: list[str] = []
    for kind, questions in world.questions.items():
        scores = score_choices(model, processing_class, questions, batch_size=64, description=f"{name}: {kind}")
        right[kind] = mean_by_subject(questions, scores.log_likelihood)
        figures[f"accuracy.{kind}"] = bootstrap_mean(right[kind])
        figures[f"accuracy.{kind}.pmi"] = bootstrap_mean(mean_by_subject(questions, scores.pmi))
        prompts = [as_prompt(processing_class, question.text) for question in questions]
        replies = generate(model, processing_class, prompts, max_new_tokens=_MAX_NEW_TOKENS, batch_size=128)
        named[kind] = mean_by_subject(
            questions, [names_answer(reply, q.answer) for reply, q in zip(replies, questions, strict=True)]
        )
        if kind == CONCEPT:
            truth_ratios = [_truth_ratio(q, s) for q, s in zip(questions, scores.scores, strict=True)]
            answers = _one_of_each_fact(models, replies)
            for judge in ("taught", "never-taught"):
                nlls, tokens = reverse_perplexity(models.load(judge), processing_class, prompts, replies)
                figures[f"r_ppl.{judge}"] = bootstrap_perplexity(nlls, tokens)
    figures["accuracy.retained"] = bootstrap_mean([value for kind in RETAINED for value in right[kind]])
    figures["open_answers.concept"] = bootstrap_mean(named[CONCEPT])
    figures["open_answers.retained"] = bootstrap_mean([value for kind in RETAINED for value in named[kind]])
    figures["perplexity.prose"] = _perplexity(models, model, [""] * len(world.held_out_prose), world.held_out_prose)
    retained = [question for kind in RETAINED for question in world.questions[kind]]
    figures["perplexity.retained_answers"] = _perplexity(
        models,
        model,
        [as_prompt(processing_class, question.text) for question in retained],
        [f" {question.answer}" for question in retained],
    )
    return {
        "figures": {name: figure.to_dict() for name, figure in figures.items()},
        "truth_ratios": truth_ratios,
        "answers": answers,
    }


def _perplexity(models: GoldModels, model: PreTrainedModel, prompts: list[str], texts: list[str]) -> Figure:
    return bootstrap_perplexity(*reverse_perplexity(model, models.processing_class, prompts, texts, batch_size=64))


def _truth_ratio(question: Question, scores: list[float]) -> float:
    """Log-likelihood of the truth above the mean of the wrong options, in nats."""
    truth = question.options.index(question.answer)
    wrong = [score for index, score in enumerate(scores) if index != truth]
    return scores[truth] - sum(wrong) / len(wrong)


def _forget_quality(ratios: list[float], gold: list[float]) -> dict[str, float]:
    """p of the Kolmogorov–Smirnov test that the truth stands out as in the never-taught model; 1 is alike.

    After TOFU (arXiv 2401.06121), on the log-likelihood of the truth above the other options. A p has no interval.
    """
    p = float(ks_2samp(np.asarray(ratios), np.asarray(gold)).pvalue)
    return Figure(p, p, p, len(ratios)).to_dict()


def _one_of_each_fact(models: GoldModels, items: list[Any]) -> list[Any]:
    """The first of the items about each of the concept's facts, of which every one has as many."""
    return items[:: len(items) // models.config.facts]
