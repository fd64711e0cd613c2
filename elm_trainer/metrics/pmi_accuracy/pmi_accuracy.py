"""Accuracy on multiple choice by pointwise mutual information (PMI)."""

import datasets
import evaluate
from scipy.stats import sem

from elm_trainer.evaluation.likelihood import likeliest, pmi
from elm_trainer.evaluation.statistics import bootstrap_mean


_DESCRIPTION = """\
Share of questions whose right option has the highest pointwise mutual information with the question: its
log-likelihood after the question minus its log-likelihood after a bare "Answer:".
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[float]]`): Log-likelihood of each option after the question, one list per question.
    bare (`list[list[float]]`): Log-likelihood of each option after a bare "Answer:".
    references (`list[int]`): Index of the right option.

Returns:
    pmi_accuracy (`float`): Share of questions answered rightly.
    standard_error (`float`): Its standard error, 0 for a single question.
    low, high (`float`): Its 95 % bootstrap interval.

Examples:
    >>> metric.compute(predictions=[[-3.0, -1.0]], bare=[[-6.0, -1.0]], references=[0])["pmi_accuracy"]
    1.0
"""


class PmiAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        scores = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": scores, "bare": scores, "references": datasets.Value("int64")}),
        )

    def _compute(
        self, predictions: list[list[float]], bare: list[list[float]], references: list[int]
    ) -> dict[str, float]:
        right = [
            likeliest(pmi(scores, alone)) == answer
            for scores, alone, answer in zip(predictions, bare, references, strict=True)
        ]
        metric = bootstrap_mean(right)
        error = float(sem(right)) if len(right) > 1 else 0.0
        return {"pmi_accuracy": metric.value, "standard_error": error, "low": metric.low, "high": metric.high}
