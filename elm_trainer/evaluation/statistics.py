"""Figures with their size and 95 % bootstrap interval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Figure:
    """A measured value, its 95 % interval and the number of items behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def bootstrap_mean(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Figure:
    """Mean with the percentile interval over resampled items.

    Raises:
        ValueError: if `values` is empty.
    """
    return _bootstrap(np.asarray(values, dtype=float), np.ones(len(values)), resamples, seed)


def bootstrap_ratio(sums: Sequence[float], counts: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Figure:
    """`Σ sums / Σ counts`, e.g. a mean per token, with the interval over resampled texts."""
    return _bootstrap(np.asarray(sums, dtype=float), np.asarray(counts, dtype=float), resamples, seed)


def bootstrap_perplexity(
    nlls: Sequence[float], tokens: Sequence[int], *, resamples: int = 2000, seed: int = 0
) -> Figure:
    """`exp(Σ nlls / Σ tokens)` with the interval over resampled texts; `nlls` are sums in nats, one per text."""
    mean = bootstrap_ratio(nlls, tokens, resamples=resamples, seed=seed)
    value, low, high = (float(np.exp(nats)) for nats in (mean.value, mean.low, mean.high))
    return Figure(value, low, high, mean.n)


def _bootstrap(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> Figure:
    if not len(sums) or not counts.sum():
        raise ValueError("There is nothing to average: measure at least one item.")
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    means = sums[draws].sum(1) / np.maximum(counts[draws].sum(1), 1e-12)
    low, high = np.percentile(means, [2.5, 97.5])
    return Figure(float(sums.sum() / counts.sum()), float(low), float(high), len(sums))
