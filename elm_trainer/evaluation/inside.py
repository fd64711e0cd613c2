"""What the layers still hold of the concept: linear probes for true statements, the logit lens, norms and ranks."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import factorize
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import Question
from ..data.tokens import text_ids, tokenize_pairs
from .hidden_states import activation_norms, final_norm, hidden_effect, hidden_states, weight_effects
from .likelihood import PROMPT, likeliest
from .pair import SIDES, ModelPair
from .statistics import Estimate, bootstrap_ratio
from .tables import plot_file


STATEMENT = "Question: {question}\nAnswer: {option}"
# Inverse strength of the L2 penalty. With more features than statements the penalty chooses among probes that all fit.
# On SmolLM2-135M's middle layers anything from 1e-3 to 1 gave the same accuracies within .05; so did PCA, more slowly.
REGULARIZATION = 0.01
_COLORS = {"reference": "tab:grey", "erased": "tab:orange"}


def look_inside(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    forget_texts: Sequence[str],
    retain_texts: Sequence[str],
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that is measured inside the models, on both sides, as JSON can hold it.

    Args:
        questions: Questions about the erased concept; a hundred or more, about many subjects.

    Returns:
        `dict`: where *curve* stands for a list over layers, the embeddings' output first, of `{"value", "low", "high",
        "n"}`:

        - `probe`: `{"reference": {"accuracy": curve, "control": curve}, "erased": {…}}`; `n` counts subjects.
        - `logit_lens`: `{"reference": {"accuracy": curve}, "erased": {…}, "chance": float, "questions": int,
          "skipped": int}`; `n` counts subjects, `skipped` the questions whose options share a first token.
        - `norms`: `{"forget": {"reference": curve, "erased": curve, "ratio": curve}, "retain": {…}}`; `n` counts texts.
        - `effect_rank`: `{"weights": [{"layer": int | None, "module": str, "singular_values": [float],
          "effective_rank": float, "stable_rank": float}] | None, "hidden": {"effective_rank": [float],
          "relative_size": curve, "tokens": int}}`; `weights` is `None` without an adapter.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: for questions, texts or models that one of the four cannot be measured on.
    """
    # First, as it may refuse an adapter and takes no time.
    weights = None if pair.adapter is None else [asdict(effect) for effect in weight_effects(pair.adapter)]
    probe: dict[str, Any] = {}
    lens: dict[str, Any] = {}
    for side in SIDES:
        with pair.use(side) as model:
            curve = probe_truth(model, processing_class, questions, batch_size=batch_size, seed=seed)
            scores = logit_lens(model, processing_class, questions, batch_size=batch_size, seed=seed)
        probe[side] = asdict(curve)
        lens[side] = {"accuracy": [layer.to_dict() for layer in scores.accuracy]}
    asked = len(scores.questions)
    norms = {
        name: asdict(activation_norms(pair, processing_class, texts, batch_size=batch_size, seed=seed))
        for name, texts in (("forget", forget_texts), ("retain", retain_texts))
    }
    hidden = hidden_effect(pair, processing_class, forget_texts, batch_size=batch_size, seed=seed)
    return {
        "probe": probe,
        "logit_lens": {**lens, "chance": scores.chance, "questions": asked, "skipped": len(questions) - asked},
        "norms": norms,
        "effect_rank": {"weights": weights, "hidden": asdict(hidden)},
    }


@dataclass(frozen=True)
class Statement:
    """A question answered with one of its options: `group` is its subject, or its text where it has none."""

    text: str
    option: str
    true: bool
    group: str


@dataclass(frozen=True)
class ProbeCurve:
    """Accuracy of the probe of each layer, the embeddings first, and of the same probes on shuffled labels."""

    accuracy: list[Estimate]
    control: list[Estimate]


def make_statements(questions: Sequence[Question], *, seed: int = 0) -> list[Statement]:
    """Two statements per question, one after the other: with the right option, and with a wrong one that is drawn."""
    statements = []
    for question in questions:
        wrong = [option for option in question.options if option != question.answer]
        drawn = random.Random(f"{question.text}-{seed}").choice(wrong)
        for option in (question.answer, drawn):
            text = STATEMENT.format(question=question.text, option=option)
            statements.append(Statement(text, option, option == question.answer, question.subject or question.text))
    return statements


def probe_truth(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    shuffles: int = 5,
    batch_size: int = 16,
    seed: int = 0,
) -> ProbeCurve:
    """Probe every layer's hidden state at a statement's last token for whether the statement is true: see [`probe_states`]."""
    statements = make_statements(questions, seed=seed)
    states = hidden_states(model, processing_class, [item.text for item in statements], batch_size=batch_size)
    return probe_states(torch.cat(states, dim=1), statements, shuffles=shuffles, seed=seed)


def probe_states(
    states: torch.Tensor, statements: Sequence[Statement], *, folds: int = 5, shuffles: int = 5, seed: int = 0
) -> ProbeCurve:
    """Cross-validated accuracy of a logistic regression on standardized states, layer by layer.

    A probe is tested on subjects it has not seen, and on answers it has not seen either: a statement whose answer
    occurs in the test fold is left out of its training. Otherwise "Paris", true of France, would be learned as a true
    answer and be wrong wherever it is a wrong option, and a layer without any knowledge would fall *below* chance.

    Args:
        states: Features, `[layers, statements, hidden]`.
        statements: In the pairs of [`make_statements`].
        folds: Parts into which the subjects are split.
        shuffles: Draws of the control, whose labels are exchanged within half of the pairs at random; its accuracy is
            the mean over the draws.

    Returns:
        [`ProbeCurve`]: one entry per layer, with the interval over resampled subjects; their number is its `n`. The
        interval does not cover what other training statements would have given.
    """
    rng = np.random.default_rng(seed)
    names, groups = np.unique([statement.group for statement in statements], return_inverse=True)
    if len(names) < folds:
        raise ValueError(f"`questions` has {len(names)} subjects for `folds`={folds}: ask about more subjects.")
    options = np.array([statement.option for statement in statements])
    truth = np.array([statement.true for statement in statements])
    fold_of = rng.permutation(len(names)) % folds
    exchanged = rng.integers(0, 2, size=(shuffles, len(statements) // 2)).astype(bool).repeat(2, axis=1)
    splits = []
    for fold in range(folds):
        test = np.flatnonzero(fold_of[groups] == fold)
        train = np.flatnonzero((fold_of[groups] != fold) & ~np.isin(options, options[test]))
        splits.append((train, test))
    if any(len(np.unique(truth[train])) < 2 for train, _ in splits):
        raise ValueError(
            f"`questions` has only {len(set(options))} different answers: leaving those of the test fold out of the "
            "training leaves nothing to train on. Use questions with more answers."
        )
    accuracy, control = [], []
    for layer in states.numpy():
        accuracy.append(_over_groups(_held_out(layer, truth, splits), groups, seed))
        shuffled = [_held_out(layer, truth ^ exchange, splits) for exchange in exchanged]
        control.append(_over_groups(np.mean(shuffled, axis=0), groups, seed))
    return ProbeCurve(accuracy, control)


def _held_out(features: np.ndarray, labels: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Whether each statement is judged rightly by the probe that has not seen it, `[statements]`."""
    if find_spec("sklearn") is None:
        raise ImportError("Probing needs scikit-learn: `pip install elm-trainer[eval]`.")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Leaving answers out may take more statements of one label than of the other.
    classifier = LogisticRegression(C=REGULARIZATION, class_weight="balanced", max_iter=1000)
    return cross_val_predict(make_pipeline(StandardScaler(), classifier), features, labels, cv=splits) == labels


def _over_groups(right: np.ndarray, groups: np.ndarray, seed: int) -> Estimate:
    """Accuracy with the interval over groups: several phrasings of one fact are no independent questions."""
    return bootstrap_ratio(np.bincount(groups, right), np.bincount(groups), seed=seed)


@dataclass(frozen=True)
class LensScores:
    """What each layer would answer.

    Attributes:
        accuracy (`list[Estimate]`): Share of questions whose right option ranks first, per layer, the embeddings first;
            the interval is over resampled subjects, and their number is its `n`.
        logits (`list[list[list[float]]]`): Logit of each option's first token, by layer and kept question.
        questions (`list[int]`): Indices of the questions that were kept.
        chance (`float`): Accuracy of a guess among the options.
    """

    accuracy: list[Estimate]
    logits: list[list[list[float]]]
    questions: list[int]
    chance: float


def logit_lens(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> LensScores:
    """Rank the options by their first token, under the final norm and head applied to every layer's hidden state.

    The state is that of the prompt's last token. A question is skipped where two options begin with the same token.
    The logits are those of the head alone: a model's own scaling or capping of them is left out, which changes no
    ranking, so that the last layer's verdicts are the model's own.
    """
    firsts = [_first_tokens(processing_class, question) for question in questions]
    indices = [index for index, tokens in enumerate(firsts) if tokens]
    if not indices:
        raise ValueError(
            f"None of the {len(questions)} `questions` has options that begin with different tokens: ask questions "
            "whose options differ in their first word."
        )
    kept = [questions[index] for index in indices]
    prompts = [PROMPT.format(question=question.text) for question in kept]
    states = torch.cat(hidden_states(model, processing_class, prompts, batch_size=batch_size), dim=1)
    logits = _option_logits(model, states, [firsts[index] for index in indices], batch_size)
    groups, _ = factorize(np.array([question.subject or question.text for question in kept], dtype=object))
    accuracy = []
    for layer in logits:
        right = [
            question.options[likeliest(row)] == question.answer for question, row in zip(kept, layer, strict=True)
        ]
        accuracy.append(_over_groups(np.array(right), groups, seed))
    return LensScores(accuracy, logits, indices, sum(1 / len(question.options) for question in kept) / len(kept))


def _first_tokens(processing_class: PreTrainedTokenizerBase, question: Question) -> list[int]:
    """First token of each option after the prompt; none where two are the same, or the prompt's tokens change."""
    head = PROMPT.format(question=question.text)
    head_ids = text_ids(processing_class, head)
    pairs = tokenize_pairs(processing_class, [(head, f" {option}") for option in question.options])
    tokens = [ids[first] for ids, first in pairs if ids[:first] == head_ids]
    return tokens if len(set(tokens)) == len(question.options) else []


@torch.inference_mode()
def _option_logits(
    model: PreTrainedModel | PeftModel, states: torch.Tensor, options: list[list[int]], batch_size: int
) -> list[list[list[float]]]:
    """Logit of each option's token, by layer and question."""
    norm, head = final_norm(model), model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: pass a causal language model.")
    scores: list[list[list[float]]] = []
    for layer in states:  # [questions, hidden]
        rows: list[list[float]] = []
        for start in range(0, len(layer), batch_size):
            # Back into the model's own precision, from which the states came.
            batch = layer[start : start + batch_size, None].to(model.device, head.weight.dtype)
            logits = head(norm(batch))[:, 0].float()  # [batch, vocab]
            chosen = zip(logits, options[start : start + batch_size], strict=True)
            rows += [row[torch.tensor(tokens, device=row.device)].tolist() for row, tokens in chosen]
        scores.append(rows)
    return scores


def plot_inside(inside: Mapping[str, Any], path: str | Path) -> None:
    """Draw what [`look_inside`] returns, four panels over the layers, into a PNG file."""
    with plot_file(path, 12, 9) as figure:
        (probe, lens), (norms, ranks) = figure.subplots(2, 2)
        for side, color in _COLORS.items():
            _curve(probe, inside["probe"][side]["accuracy"], color, side)
            control = [point["value"] for point in inside["probe"][side]["control"]]
            probe.plot(control, linestyle=":", color=color, label=f"{side}, labels shuffled")
            _curve(lens, inside["logit_lens"][side]["accuracy"], color, side)
        probe.axhline(0.5, color="black", linestyle="--", linewidth=1, label="chance")
        probe.set(title="Linear probe: is the statement true?", ylabel="accuracy", ylim=(0.3, 1.02))
        lens.axhline(inside["logit_lens"]["chance"], color="black", linestyle="--", linewidth=1, label="chance")
        lens.set(title="Logit lens: the right option's first token leads", ylabel="accuracy", ylim=(0, 1.02))
        for text, color in (("forget", "tab:red"), ("retain", "tab:blue")):
            _curve(norms, inside["norms"][text]["ratio"], color, f"{text} text")
        norms.axhline(1, color="black", linestyle="--", linewidth=1)
        norms.set(title="Size of the hidden states", ylabel="L2 norm, erased / reference")
        norms.ticklabel_format(axis="y", useOffset=False)
        hidden = inside["effect_rank"]["hidden"]
        label = f"change of hidden states ({hidden['tokens']} tokens)"
        ranks.plot(hidden["effective_rank"], marker=".", color="tab:green", label=label)
        # The state behind a layer comes after the embeddings' and so has the next number.
        points = [
            (weight["layer"] + 1, weight["effective_rank"])
            for weight in inside["effect_rank"]["weights"] or []
            if weight["layer"] is not None
        ]
        if points:
            label = "change of an adapted weight"
            ranks.plot(*zip(*points, strict=True), "x", color="tab:purple", alpha=0.6, label=label)
        ranks.set(title="Effective rank of the erasure's effect", ylabel="effective rank", ylim=(0, None))
        for axes in (probe, lens, norms, ranks):
            axes.set(xlabel="layer (0: embeddings)", xlim=(0, len(hidden["effective_rank"]) - 1))
            axes.grid(alpha=0.2)
            axes.legend(fontsize=8)


def _curve(axes: Any, points: Sequence[Mapping[str, float]], color: str, label: str) -> None:
    values, low, high = ([point[key] for point in points] for key in ("value", "low", "high"))
    axes.plot(values, marker=".", color=color, label=label)
    axes.fill_between(range(len(points)), low, high, color=color, alpha=0.2, linewidth=0)
