"""Does a layer still hold the truth of a fact? Linear probes that tell true statements from false ones."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import Question
from .hidden_states import hidden_states
from .statistics import Figure, bootstrap_ratio


STATEMENT = "Question: {question}\nAnswer: {option}"
# Inverse strength of the L2 penalty. With more features than statements the penalty chooses among probes that all fit.
# On SmolLM2-135M's middle layers anything from 1e-3 to 1 gave the same accuracies within .05; so did PCA, more slowly.
REGULARISATION = 0.01


@dataclass(frozen=True)
class Statement:
    """A question answered with one of its options.

    Attributes:
        text (`str`): Question and answer.
        option (`str`): The answer given.
        true (`bool`): Whether it is the right one.
        group (`str`): The question's subject, or its text where it has none.
    """

    text: str
    option: str
    true: bool
    group: str


@dataclass(frozen=True)
class ProbeCurve:
    """Accuracy of the probe of each layer, the embeddings first, and of the same probes on shuffled labels."""

    accuracy: list[Figure]
    control: list[Figure]


def make_statements(questions: Sequence[Question], *, seed: int = 0) -> list[Statement]:
    """Two statements per question, one after the other: with the right option, and with a wrong one that is drawn."""
    statements = []
    for question in questions:
        wrong = [option for option in question.options if option != question.answer]
        drawn = random.Random(f"{question.text}-{seed}").choice(wrong)
        for option in (question.answer, drawn):
            text = STATEMENT.format(question=question.text, option=option)
            group = question.subject or question.text
            statements.append(Statement(text, option, option == question.answer, group))
    return statements


def probe_truth(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    folds: int = 5,
    shuffles: int = 5,
    batch_size: int = 16,
    seed: int = 0,
) -> ProbeCurve:
    """Probe every layer's hidden state at a statement's last token for whether the statement is true.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): Model, already in evaluation mode.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        questions (`Sequence[Question]`): Questions; each makes two statements.
        folds (`int`, *optional*, defaults to `5`): See [`probe_states`].
        shuffles (`int`, *optional*, defaults to `5`): See [`probe_states`].
        batch_size (`int`, *optional*, defaults to `16`): Statements per forward pass.
        seed (`int`, *optional*, defaults to `0`): Seed of the wrong options, folds, shuffles and intervals.

    Returns:
        [`ProbeCurve`]: one figure per layer.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: see [`probe_states`].
    """
    statements = make_statements(questions, seed=seed)
    states = hidden_states(model, processing_class, [item.text for item in statements], batch_size=batch_size)
    return probe_states(torch.cat(states, dim=1), statements, folds=folds, shuffles=shuffles, seed=seed)


def probe_states(
    states: torch.Tensor,
    statements: Sequence[Statement],
    *,
    folds: int = 5,
    shuffles: int = 5,
    seed: int = 0,
) -> ProbeCurve:
    """Cross-validated accuracy of a logistic regression on standardised states, layer by layer.

    A probe is tested on subjects it has not seen, and on answers it has not seen either: a statement whose answer
    occurs in the test fold is left out of its training. Otherwise "Paris", true of France, would be learnt as a true
    answer and be wrong wherever it is a wrong option, and a layer without any knowledge would fall *below* chance.

    Args:
        states (`torch.Tensor`): Features, `[layers, statements, hidden]`.
        statements (`Sequence[Statement]`): In the pairs of [`make_statements`].
        folds (`int`, *optional*, defaults to `5`): Parts into which the subjects are split.
        shuffles (`int`, *optional*, defaults to `5`): Draws of the control, whose labels are exchanged within half
            of the pairs at random; its accuracy is the mean over the draws.
        seed (`int`, *optional*, defaults to `0`): Seed of folds, shuffles and intervals.

    Returns:
        [`ProbeCurve`]: one figure per layer, with the interval over resampled subjects; their number is its `n`. The
        interval does not cover what other training statements would have given.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if there are fewer subjects than folds, or the questions share so few answers that none are left
            to train on.
    """
    rng = np.random.default_rng(seed)
    names = sorted({statement.group for statement in statements})
    if len(names) < folds:
        raise ValueError(f"`questions` has {len(names)} subjects for `folds`={folds}: ask about more subjects.")
    groups = np.array([names.index(statement.group) for statement in statements])
    options = np.array([statement.option for statement in statements])
    fold_of = rng.permutation(len(names)) % folds
    splits = []
    for fold in range(folds):
        test = np.flatnonzero(fold_of[groups] == fold)
        train = np.flatnonzero((fold_of[groups] != fold) & ~np.isin(options, options[test]))
        splits.append((train, test))
    truth = np.array([statement.true for statement in statements])
    exchanged = rng.integers(0, 2, size=(shuffles, len(statements) // 2)).astype(bool).repeat(2, axis=1)
    if any(len(np.unique(truth[train])) < 2 for train, _ in splits):
        raise ValueError(
            f"`questions` has only {len(set(options))} different answers: leaving those of the test fold out of the "
            "training leaves nothing to train on. Use questions with more answers."
        )
    accuracy, control = [], []
    for layer in states.numpy():
        right = _held_out(layer, truth, splits)
        accuracy.append(_over_groups(right, groups, seed))
        shuffled = [_held_out(layer, truth ^ exchange, splits) for exchange in exchanged]
        control.append(_over_groups(np.mean(shuffled, axis=0), groups, seed))
    return ProbeCurve(accuracy, control)


def _held_out(features: np.ndarray, labels: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Whether each statement is judged rightly by the probe that has not seen it, `[statements]`."""
    if find_spec("sklearn") is None:
        raise ImportError("Probing needs scikit-learn: `pip install elm-trainer[eval]`.")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    right: np.ndarray = np.zeros(len(labels), dtype=bool)
    for train, test in splits:
        # Leaving answers out may take more statements of one label than of the other.
        classifier = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=1000)
        probe = make_pipeline(StandardScaler(), classifier).fit(features[train], labels[train])
        right[test] = probe.predict(features[test]) == labels[test]
    return right


def _over_groups(right: np.ndarray, groups: np.ndarray, seed: int) -> Figure:
    return bootstrap_ratio(np.bincount(groups, right), np.bincount(groups), seed=seed)
