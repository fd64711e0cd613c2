"""How fast the models of the gold standard learn the concept, beside the one that was never taught it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.integrate import trapezoid
from transformers import TrainerCallback

from ..data.invented import CONCEPT
from ..data.questions import CHANCE, Question
from ..evaluation.multiple_choice import score_choices
from ..evaluation.statistics import Figure, bootstrap
from .models import GoldModels, fine_tune


SPLITS = ("all", "half")


def relearn(models: GoldModels, name: str, split: str) -> dict[str, Any]:
    """Fine-tune a model on the concept's texts, and ask for the concept along the way.

    Args:
        models ([`GoldModels`]): Models and world.
        name (`str`): Model to start from.
        split (`str`):
            `"all"`: it reads every fact and is asked for every fact. `"half"`: it reads one half of the facts and is
            asked for the other, whose answers it never reads: what comes back was still inside.

    Returns:
        `dict`: `steps`, with 0 for the model as it is, and `rights`, the share of right answers to each subject's
        questions at each of these steps.
    """
    texts, questions = _material(models, split)
    model, processing_class, config = models.load(name), models.processing_class, models.config
    steps = sorted(set(config.relearning_steps))
    rights = [right_by_subject(model, processing_class, questions)]

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in steps:
                rights.append(right_by_subject(model, processing_class, questions))

    fine_tune(
        model, processing_class, texts, steps=steps[-1], batch_size=config.relearning_batch_size,
        learning_rate=config.relearning_learning_rate, schedule="constant", seed=config.seed, callbacks=[Ask()],
    )  # fmt: skip
    return {"steps": [0, *steps], "rights": rights}


def right_by_subject(model: Any, processing_class: Any, questions: Sequence[Question]) -> list[float]:
    """Share of each subject's questions answered rightly by log-likelihood, subjects in order of appearance.

    All answers of a kind are equally frequent in this world, so PMI has no preference to remove.
    """
    verdicts = score_choices(model, processing_class, questions, batch_size=64).log_likelihood
    return mean_by_subject(questions, verdicts)


def mean_by_subject(questions: Sequence[Question], values: Sequence[float]) -> list[float]:
    """Mean over each subject's questions: the phrasings of one fact stand or fall together and are one item."""
    groups: dict[str, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        groups.setdefault(question.subject, []).append(float(value))
    return [sum(group) / len(group) for group in groups.values()]


def compare_relearning(
    results: Mapping[str, Mapping[str, Any]], *, baseline: str = "never-taught", taught: str = "taught", seed: int = 0
) -> tuple[dict[str, list[list[float]]], dict[str, Any]]:
    """Curves and speeds of relearning, with 95 % intervals over subjects, which are resampled alike for all models.

    Args:
        results (`Mapping`): What [`relearn`] returned, by name of the model, all on one split.
        baseline (`str`, *optional*, defaults to `"never-taught"`): Model the others are compared with.
        taught (`str`, *optional*, defaults to `"taught"`): Model whose accuracy before relearning sets the goal.
        seed (`int`, *optional*, defaults to `0`): Seed of the resamples.

    Returns:
        `tuple[dict, dict]`: by model, rows of step, accuracy, low and high; and `goal` (half-way from chance to the
        taught model), `ordering` (the slowest model first: by steps to the goal, then by area) and `models`, each with
        `steps` to the goal (interpolated; at least 1, at most the last), `reached`, `censored` (share of resamples in
        which the goal is not reached, where `steps` is a lower bound), `ratio` (the baseline's steps over the model's:
        1 is as slow as never taught, more is faster), `area` (mean accuracy over the steps) and `area_difference` to
        the baseline.
    """
    steps = np.asarray(results[baseline]["steps"], dtype=float)  # [steps]
    rights = {name: np.asarray(result["rights"]) for name, result in results.items()}  # each [steps, subjects]
    subjects = rights[baseline].shape[1]
    goal = (CHANCE + float(rights[taught][0].mean())) / 2
    curves, crossings, areas = {}, {}, {}
    for name, right in rights.items():
        # The first row is the curve itself, the others are resamples: [1 + resamples, steps].
        accuracy, samples = bootstrap(lambda drawn: drawn.mean(-1), right, seed=seed)
        drawn = np.concatenate([accuracy[None], samples.T])
        low, high = np.percentile(drawn[1:], [2.5, 97.5], axis=0)
        curves[name] = np.stack([steps, drawn[0], low, high], axis=1).tolist()
        crossings[name] = np.array([steps_to(goal, steps, curve) for curve in drawn])
        areas[name] = trapezoid(drawn, steps, axis=1) / (steps[-1] - steps[0])
    clipped = {name: np.clip(np.nan_to_num(found, nan=steps[-1]), 1, None) for name, found in crossings.items()}
    figures: dict[str, dict[str, Any]] = {
        name: {
            "steps": _figure(clipped[name], subjects),
            "reached": not np.isnan(crossings[name][0]),
            "censored": float(np.isnan(crossings[name][1:]).mean()),
            "ratio": _figure(clipped[baseline] / clipped[name], subjects),
            "area": _figure(areas[name], subjects),
            "area_difference": _figure(areas[name] - areas[baseline], subjects),
        }
        for name in rights
    }
    ordering = sorted(figures, key=lambda name: (-figures[name]["steps"]["value"], figures[name]["area"]["value"]))
    return curves, {"goal": goal, "ordering": ordering, "models": figures}


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


def _material(models: GoldModels, split: str) -> tuple[list[str], list[Question]]:
    """The texts to learn from, and the questions to ask."""
    world = models.world
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}: use one of {', '.join(SPLITS)}.")
    if split == "all":
        return world.forget["text"][:], world.questions[CONCEPT]
    read, asked = world.halves()
    texts = [text for text in world.forget["text"] if any(subject in text for subject in read)]
    return texts, [question for question in world.questions[CONCEPT] if question.subject in asked]


def _figure(values: np.ndarray, subjects: int) -> dict[str, float]:
    """The first value, with the interval of the others."""
    return Figure.of(float(values[0]), values[1:], subjects).to_dict()
