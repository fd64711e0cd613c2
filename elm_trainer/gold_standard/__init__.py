"""The gold standard: an erased model beside one of the same making that was never taught the concept, asked and retaught.

Its report as a table and as a picture stands at the end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pandas import Series
from rich.table import Column, Table
from scipy.integrate import trapezoid
from transformers import TrainerCallback
from transformers.utils import logging

from ..data.invented import CONCEPT, RETAINED
from ..data.questions import CHANCE, Question, names_answer
from ..evaluation.benchmarks import forget_quality
from ..evaluation.fluency import as_prompt, generate_answers
from ..evaluation.likelihood import reverse_perplexity, score_choices
from ..evaluation.report import SCHEMA_VERSION, environment, read_report
from ..evaluation.statistics import Estimate, bootstrap, bootstrap_mean, bootstrap_perplexity
from ..evaluation.tables import plot_file, terminal_table
from ..files import Journal, discard_unfinished, write_json
from ..run_lock import only_run_in
from .models import MODELS, GoldModels, GoldStandardConfig, fine_tune


logger = logging.get_logger(__name__)
SPLITS = ("all", "half")


def gold_standard(config: GoldStandardConfig | None = None, *, output_dir: str | Path) -> dict[str, Any]:
    """Train a small model with and without an invented concept, erase it from the first, and compare.

    Compared are the taught model, the never-taught one, the taught one erased by [`ElmTrainer`] and the taught one
    after plain gradient ascent: on every measure, and in how fast they learn the concept (again).

    Args:
        config ([`GoldStandardConfig`], *optional*): Settings.
        output_dir (`str` or `Path`): Where `gold_standard.json` goes. Models are kept in `models/` beside it and
            results stream to `gold_standard.partial.jsonl`, so that an interrupted run continues where it was and a
            repeated one only reads.

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
    path = output_dir / "gold_standard.json"
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
    metrics = {
        metric: {name: measured[name]["figures"][metric] for name in MODELS}
        for metric in measured[MODELS[0]]["figures"]
    }
    ratios = {name: measured[name]["truth_ratios"] for name in MODELS}
    quality = {name: forget_quality(ratios[name], ratios["never-taught"]) for name in MODELS}
    # A p has no interval.
    metrics["forget_quality"] = {name: Estimate(p, p, p, len(ratios[name])).to_dict() for name, p in quality.items()}
    report = {
        "schema_version": SCHEMA_VERSION,
        "kind": "gold-standard",
        "chance": CHANCE,
        "figures": metrics,
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
    metrics: dict[str, Estimate] = {}
    named: dict[str, list[float]] = {}
    right: dict[str, list[float]] = {}
    truth_ratios: list[float] = []
    answers: list[str] = []
    for kind, questions in world.questions.items():
        scores = score_choices(model, processing_class, questions, batch_size=64, description=f"{name}: {kind}")
        right[kind] = mean_by_subject(questions, scores.log_likelihood)
        metrics[f"accuracy.{kind}"] = bootstrap_mean(right[kind])
        metrics[f"accuracy.{kind}.pmi"] = bootstrap_mean(mean_by_subject(questions, scores.pmi))
        prompts = [as_prompt(processing_class, question.text) for question in questions]
        replies = generate_answers(model, processing_class, prompts, max_new_tokens=8, batch_size=128).texts
        named[kind] = mean_by_subject(
            questions, [names_answer(reply, q.answer) for reply, q in zip(replies, questions, strict=True)]
        )
        if kind == CONCEPT:
            truth_ratios = [_truth_ratio(q, s) for q, s in zip(questions, scores.scores, strict=True)]
            answers = _one_of_each_fact(models, replies)
            for judge in ("taught", "never-taught"):
                nlls, tokens = reverse_perplexity(models.load(judge), processing_class, prompts, replies)
                metrics[f"r_ppl.{judge}"] = bootstrap_perplexity(nlls, tokens)
    metrics["accuracy.retained"] = bootstrap_mean([value for kind in RETAINED for value in right[kind]])
    metrics["open_answers.concept"] = bootstrap_mean(named[CONCEPT])
    metrics["open_answers.retained"] = bootstrap_mean([value for kind in RETAINED for value in named[kind]])
    retained = [question for kind in RETAINED for question in world.questions[kind]]
    answered = [as_prompt(processing_class, question.text) for question in retained]
    for what, prompts, texts in (
        ("prose", [""] * len(world.held_out_prose), world.held_out_prose),
        ("retained_answers", answered, [f" {question.answer}" for question in retained]),
    ):
        nlls, tokens = reverse_perplexity(model, processing_class, prompts, texts, batch_size=64)
        metrics[f"perplexity.{what}"] = bootstrap_perplexity(nlls, tokens)
    return {
        "figures": {name: metric.to_dict() for name, metric in metrics.items()},
        "truth_ratios": truth_ratios,
        "answers": answers,
    }


def _truth_ratio(question: Question, scores: list[float]) -> float:
    """Log-likelihood of the truth above the mean of the wrong options, in nats: what [`forget_quality`] is taken of."""
    truth = question.options.index(question.answer)
    wrong = [score for index, score in enumerate(scores) if index != truth]
    return scores[truth] - sum(wrong) / len(wrong)


def _one_of_each_fact(models: GoldModels, items: list[Any]) -> list[Any]:
    """The first of the items about each of the concept's facts, of which every one has as many."""
    return items[:: len(items) // models.config.facts]


def relearn(models: GoldModels, name: str, split: str) -> dict[str, Any]:
    """Fine-tune a model on the concept's texts, and ask for the concept along the way.

    Args:
        name: Model to start from.
        split: `"all"`: it reads every fact and is asked for every fact. `"half"`: it reads one half of the facts and
            is asked for the other, whose answers it never reads: what comes back was still inside.

    Returns:
        `dict`: `steps`, with 0 for the model as it is, and `rights`, the share of right answers to each subject's
        questions at each of these steps.
    """
    world, model, processing_class, config = models.world, models.load(name), models.processing_class, models.config
    texts, questions = world.forget["text"], world.questions[CONCEPT]
    if split == "half":
        read, asked = world.halves()
        texts = [text for text in texts if any(subject in text for subject in read)]
        questions = [question for question in questions if question.subject in asked]
    steps = sorted(set(config.relearning_steps))

    def ask() -> list[float]:
        """Share of each subject's questions answered rightly, subjects in order of appearance."""
        # All answers of a kind are equally frequent in this world, so PMI has no preference to remove.
        scores = score_choices(model, processing_class, questions, batch_size=64)
        return mean_by_subject(questions, scores.log_likelihood)

    rights = [ask()]

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in steps:
                rights.append(ask())

    fine_tune(
        model, processing_class, texts, max_steps=steps[-1], per_device_train_batch_size=config.relearning_batch_size,
        learning_rate=config.relearning_learning_rate, lr_scheduler_type="constant", seed=config.seed, callbacks=[Ask()],
    )  # fmt: skip
    return {"steps": [0, *steps], "rights": rights}


def mean_by_subject(questions: Sequence[Question], values: Sequence[float]) -> list[float]:
    """Mean over each subject's questions: the phrasings of one fact stand or fall together and are one item."""
    subjects = [question.subject for question in questions]
    return Series(values, dtype=float).groupby(subjects, sort=False).mean().tolist()


def compare_relearning(
    results: Mapping[str, Mapping[str, Any]], seed: int = 0
) -> tuple[dict[str, list[list[float]]], dict[str, Any]]:
    """Curves and speeds of relearning, with 95 % intervals over subjects, which are resampled alike for all models.

    Args:
        results: What [`relearn`] returned, by name of the model, all on one split.
        seed: Seed of the resamples.

    Returns:
        `tuple[dict, dict]`: by model, rows of step, accuracy, low and high; and `goal` (half-way from chance to the
        taught model), `ordering` (the slowest model first: by steps to the goal, then by area) and `models`, each with
        `steps` to the goal (interpolated; at least 1, at most the last), `reached`, `censored` (share of resamples in
        which the goal is not reached, where `steps` is a lower bound), `ratio` (the never-taught's steps over the model's:
        1 is as slow as never taught, more is faster), `area` (mean accuracy over the steps) and `area_difference` to
        the never-taught one.
    """
    steps = np.asarray(results["never-taught"]["steps"], dtype=float)  # [steps]
    rights = {name: np.asarray(result["rights"]) for name, result in results.items()}  # each [steps, subjects]
    subjects = rights["never-taught"].shape[1]
    goal = (CHANCE + float(rights["taught"][0].mean())) / 2
    curves, crossings, areas = {}, {}, {}
    for name, right in rights.items():
        # The first row is the curve itself, the others are resamples: [1 + resamples, steps].
        accuracy, samples = bootstrap(lambda drawn: drawn.mean(-1), right, seed=seed)
        drawn = np.concatenate([accuracy[None], samples.T])
        low, high = np.percentile(drawn[1:], [2.5, 97.5], axis=0)
        curves[name] = np.stack([steps, drawn[0], low, high], axis=1).tolist()
        crossings[name] = np.array([steps_to(goal, steps, curve) for curve in drawn])
        areas[name] = trapezoid(drawn, steps, axis=1) / (steps[-1] - steps[0])

    def metric(values: np.ndarray) -> dict[str, float]:
        return Estimate.of(float(values[0]), values[1:], subjects).to_dict()

    clipped = {name: np.clip(np.nan_to_num(found, nan=steps[-1]), 1, None) for name, found in crossings.items()}
    metrics: dict[str, dict[str, Any]] = {
        name: {
            "steps": metric(clipped[name]),
            "reached": not np.isnan(crossings[name][0]),
            "censored": float(np.isnan(crossings[name][1:]).mean()),
            "ratio": metric(clipped["never-taught"] / clipped[name]),
            "area": metric(areas[name]),
            "area_difference": metric(areas[name] - areas["never-taught"]),
        }
        for name in rights
    }
    ordering = sorted(metrics, key=lambda name: (-metrics[name]["steps"]["value"], metrics[name]["area"]["value"]))
    return curves, {"goal": goal, "ordering": ordering, "models": metrics}


def steps_to(goal: float, steps: np.ndarray, curve: np.ndarray) -> float:
    """The step at which a curve first reaches the goal, linear between its points; `nan` if it never does."""
    reached = np.flatnonzero(curve >= goal)
    if not len(reached):
        return float("nan")
    at = int(reached[0])
    if at == 0:
        return float(steps[0])
    share = (goal - curve[at - 1]) / (curve[at] - curve[at - 1])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


# The measures that a reader compares first; the report holds all of them.
_SHOWN = {
    "accuracy.keepers": "concept, ranked rightly",
    "accuracy.retained": "retained, ranked rightly",
    "open_answers.concept": "concept, named freely",
    "open_answers.retained": "retained, named freely",
    "perplexity.prose": "perplexity of prose",
}


def render_gold_standard(report: Mapping[str, Any]) -> Table:
    """The four models side by side: plain measures, then how fast each learns the concept."""
    columns = (Column("measure"), *(Column(model, no_wrap=True) for model in MODELS))
    table = terminal_table("Beside a model that was never taught (intervals: gold_standard.json)", *columns)
    for name in _SHOWN:
        table.add_row(_SHOWN[name], *(_cell(report["figures"][name][model]) for model in MODELS))
    for split, found in report["relearning"].items():
        for measure, label in (("steps", "steps to relearn"), ("ratio", "times the never-taught's speed")):
            entries = [found["models"][model] for model in MODELS]
            # A model that never got there needs at least so many steps.
            marks = ["> " if measure == "steps" and not entry["reached"] else "" for entry in entries]
            cells = [mark + _cell(entry[measure]) for mark, entry in zip(marks, entries, strict=True)]
            table.add_row(f"{label} ({split})", *cells)
    return table


def _cell(metric: Mapping[str, float]) -> str:
    # With intervals, four models would not stand side by side in 80 columns.
    return f"{metric['value']:.3g}"


COLORS = {"taught": "tab:grey", "never-taught": "tab:green", "erased": "tab:orange", "gradient-ascent": "tab:purple"}
_RELEARNING = {"all": "Relearning all facts", "half": "Relearning half of the facts, asked for the other half"}


def plot_gold_standard(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw the relearning curves beside the never-taught model's, and the plain measures of each, into a PNG file."""
    with plot_file(path, 12, 12) as figure:
        top, middle, bottom = figure.subfigures(3, 1, squeeze=False)[:, 0]
        panels = dict(zip(_RELEARNING, top.subplots(1, 2), strict=True))
        accuracies, answers = middle.subplots(1, 2, width_ratios=(2, 1))
        perplexities, speeds = bottom.subplots(1, 2, width_ratios=(4, 3))
        for split, title in _RELEARNING.items():
            axes = panels[split]
            for name, points in report["curves"][split].items():
                steps, values, lows, highs = zip(*points, strict=True)
                axes.plot(steps, values, marker=".", color=COLORS[name], label=name)
                axes.fill_between(steps, lows, highs, color=COLORS[name], alpha=0.15)
            axes.axhline(report["relearning"][split]["goal"], color="black", linestyle=":", linewidth=1, label="goal")
            axes.axhline(report["chance"], color="black", linestyle="--", linewidth=1, label="chance")
            axes.set(title=title, xlabel="step", ylabel="four-choice accuracy", ylim=(0, 1.02))
        panels["half"].legend(loc="center right", fontsize=8)
        kinds = [name for name in report["figures"] if name.startswith("accuracy.") and name.count(".") == 1]
        _bars(accuracies, report["figures"], kinds)
        accuracies.axhline(report["chance"], color="black", linestyle="--", linewidth=1)
        accuracies.set(title="Four-choice accuracy", ylim=(0, 1.02))
        _bars(answers, report["figures"], ["open_answers.concept", "open_answers.retained"])
        answers.set(title="Free answers that name the truth", ylim=(0, 1.02))
        names = [name for name in report["figures"] if "perplexity." in name or name.startswith("r_ppl.")]
        _bars(perplexities, report["figures"], names)
        perplexities.set(title="Perplexity and R-PPL by judge", yscale="log")
        ratios = {name: model["ratio"] for name, model in report["relearning"]["all"]["models"].items()}
        for row, name in enumerate(reversed(report["ordering"])):
            speeds.plot([ratios[name]["low"], ratios[name]["high"]], [row, row], color=COLORS[name])
            speeds.plot(ratios[name]["value"], row, "o", color=COLORS[name])
        speeds.set_yticks(range(len(ratios)), list(reversed(report["ordering"])), fontsize=8)
        speeds.axvline(1, color=COLORS["never-taught"], linewidth=1)
        speeds.set(title="Speed of relearning (never taught = 1)", xscale="log")


def _bars(axes: Any, figures: Mapping[str, Any], keys: list[str]) -> None:
    width = 0.8 / len(COLORS)
    for place, (name, color) in enumerate(COLORS.items()):
        found = [figures[key][name] for key in keys]
        values = [figure["value"] for figure in found]
        # A percentile interval need not hold the value itself; error bars cannot be negative.
        errors = [
            [max(0, figure["value"] - figure["low"]) for figure in found],
            [max(0, figure["high"] - figure["value"]) for figure in found],
        ]
        offsets = [index + (place - 1.5) * width for index in range(len(keys))]
        axes.bar(offsets, values, width, yerr=errors, color=color, label=name, capsize=1.5)
    axes.set_xticks(range(len(keys)), [_label(key) for key in keys], fontsize=9)


def _label(key: str) -> str:
    kind, _, what = key.partition(".")
    # What is erased from the invented world is who keeps a place.
    words = {
        "keepers": "keepers\n(the concept)",
        "retained": "all that is\nretained",
        "retained_answers": "retained\nanswers",
    }
    return f"R-PPL by\n{what}" if kind == "r_ppl" else words.get(what, what)
