"""Figures with their size and 95 % bootstrap interval."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest


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


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided p of McNemar's exact test that as many questions turned right as turned wrong.

    Raises:
        ValueError: if the two do not judge the same questions.
    """
    if len(before) != len(after):
        raise ValueError(f"`before` holds {len(before)} verdicts and `after` {len(after)}: judge the same questions.")
    gained = sum(bool(new) and not old for old, new in zip(before, after, strict=True))
    lost = sum(bool(old) and not new for old, new in zip(before, after, strict=True))
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method, in the order given."""
    corrected = [1.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    counts_before: Sequence[float] | None = None,
    counts_after: Sequence[float] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Figure, float]:
    """Difference `after − before` of two means (or means per token) over the same items, resampled together.

    Args:
        before (`Sequence[float]`): Value (or sum over tokens) of each item.
        after (`Sequence[float]`): The same of the other model, in the same order.
        counts_before (`Sequence[float]`, *optional*): Tokens behind each value of `before`; 1 by default.
        counts_after (`Sequence[float]`, *optional*): Tokens behind each value of `after`.

    Returns:
        `tuple[Figure, float]`: the difference with its 95 % interval, and a two-sided bootstrap p: twice the smaller
        share of resamples on either side of zero, never below `1 / resamples`.

    Raises:
        ValueError: if the two do not judge the same items, or there are none.
    """
    if len(before) != len(after):
        raise ValueError(f"`before` holds {len(before)} items and `after` {len(after)}: judge the same ones.")
    sides = []
    rows = _draws(len(before), resamples, seed)
    for sums, counts in ((before, counts_before), (after, counts_after)):
        values = np.asarray(sums, dtype=float)
        tokens = np.ones(len(values)) if counts is None else np.asarray(counts, dtype=float)
        sides.append((values.sum() / tokens.sum(), values[rows].sum(1) / np.maximum(tokens[rows].sum(1), 1e-12)))
    differences = sides[1][1] - sides[0][1]
    low, high = np.percentile(differences, [2.5, 97.5])
    tails = min(np.mean(differences <= 0), np.mean(differences >= 0))
    p = min(1.0, max(2 * float(tails), 1 / resamples))
    return Figure(float(sides[1][0] - sides[0][0]), float(low), float(high), len(before)), p


def entropy(labels: Sequence[str]) -> float:
    """Entropy of how often each label occurs, in nats: 0 where all are the same, `log n` where all differ."""
    counts = np.array(list(Counter(labels).values()), dtype=float)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0


def share_left(
    before: Sequence[float],
    after: Sequence[float],
    chances: Sequence[float],
    groups: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Figure:
    r"""Share of a margin over chance that is left: `Σ (after − chance) / Σ (before − chance)`.

    Args:
        before (`Sequence[float]`): Verdict on each item.
        after (`Sequence[float]`): The same of the other model, in the same order.
        chances (`Sequence[float]`): Probability that a guess at the item is right.
        groups (`Sequence`): What each item is about. Groups are resampled, each with all its items in both models: two
            questions about one subject are no independent items.

    Returns:
        [`Figure`]: 0 where the second model is at chance, 1 where it is as good as the first, with the 95 % interval of
        a paired bootstrap; `n` counts items. Meaningless where the first is near chance itself.

    Raises:
        ValueError: if there are no items, or the two do not judge the same ones.
    """
    if len(before) != len(after):
        raise ValueError(f"`before` holds {len(before)} items and `after` {len(after)}: judge the same ones.")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    rows = _draws(len(numbers), resamples, seed)
    places = np.array([numbers[group] for group in groups])
    margins = [np.asarray(side, dtype=float) - np.asarray(chances, dtype=float) for side in (before, after)]
    sums = [np.bincount(places, weights=margin) for margin in margins]
    first, second = (part[rows].sum(1) for part in sums)
    low, high = np.percentile(second / _apart_from_zero(first), [2.5, 97.5])
    return Figure(float(sums[1].sum() / _apart_from_zero(sums[0].sum())), float(low), float(high), len(before))


def _apart_from_zero(values: Any) -> Any:
    """The values, those at most 0 as a tiny positive number: a share of no margin is as good as infinite."""
    return np.maximum(values, 1e-9)


def _draws(items: int, resamples: int, seed: int) -> np.ndarray:
    """Which items each resample holds, `[resamples, items]`."""
    if not items:
        raise ValueError("There is nothing to average: measure at least one item.")
    return np.random.default_rng(seed).integers(0, items, size=(resamples, items))


def _bootstrap(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> Figure:
    draws = _draws(len(sums), resamples, seed)
    if not counts.sum():
        raise ValueError("There is nothing to average: measure at least one item.")
    means = sums[draws].sum(1) / np.maximum(counts[draws].sum(1), 1e-12)
    low, high = np.percentile(means, [2.5, 97.5])
    return Figure(float(sums.sum() / counts.sum()), float(low), float(high), len(sums))
