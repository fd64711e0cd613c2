"""Measured values, the items that they are made of, their 95 % bootstrap intervals, and what the items of both sides say."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import binomtest

from .pair import SIDES, Side
from .verdict import RANKING_RULES


RESAMPLES = 2000
# Margin of the reference over chance from which on a metric says something about what was erased.
LEAST_MARGIN = 0.15


@dataclass(frozen=True)
class Estimate:
    """A measured value, its 95 % interval and the number of items behind it."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, value: float, samples: np.ndarray, n: int) -> "Estimate":
        """A value with the percentile interval of its resamples, `[resamples]`."""
        low, high = np.percentile(samples, [2.5, 97.5])
        return cls(float(value), float(low), float(high), n)

    def exp(self) -> "Estimate":
        """Of a mean of nats per token, the perplexity; of a difference of such means, the ratio of perplexities."""
        value, low, high = (float(np.exp(nats)) for nats in (self.value, self.low, self.high))
        return Estimate(value, low, high, self.n)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def bootstrap(
    statistic: Callable[..., Any], *columns: Any, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Any, np.ndarray]:
    """A statistic of items, and the same of resamples of these items.

    Calls with the same seed and number of items draw the same items, so that their resamples are paired.

    Args:
        statistic: Takes the columns, and reduces their last axis.
        *columns (array): What is known of each item, `[..., items]`.
        seed: Seed of the draws.

    Returns:
        `tuple`: the statistic, `[...]`, and its resamples, `[..., resamples]`.

    Raises:
        ValueError: if there are no items.
    """
    arrays = [np.asarray(column, dtype=float) for column in columns]
    items = arrays[0].shape[-1]
    if not items:
        raise ValueError("There is nothing to average: measure at least one item.")
    # As scipy.stats.bootstrap draws them, which refuses a single item.
    rows = np.random.default_rng(seed).integers(0, items, size=(resamples, items))
    return statistic(*arrays), statistic(*(array[..., rows] for array in arrays))


def ratio(sums: np.ndarray, counts: np.ndarray) -> Any:
    """`Σ sums / Σ counts` over the last axis."""
    return sums.sum(-1) / np.maximum(counts.sum(-1), 1e-12)


def bootstrap_mean(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean with the percentile interval over resampled items.

    Raises:
        ValueError: if `values` is empty.
    """
    return bootstrap_ratio(values, np.ones(len(values)), resamples=resamples, seed=seed)


def bootstrap_ratio(
    sums: Sequence[float], counts: Sequence[float] | np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """`Σ sums / Σ counts`, e.g. a mean per token, with the interval over resampled texts."""
    if not np.sum(counts):
        raise ValueError("There is nothing to average: measure at least one item.")
    return Estimate.of(*bootstrap(ratio, sums, counts, resamples=resamples, seed=seed), len(sums))


def bootstrap_perplexity(
    nlls: Sequence[float], tokens: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """`exp(Σ nlls / Σ tokens)` with the interval over resampled texts; `nlls` are sums in nats, one per text."""
    return bootstrap_ratio(nlls, tokens, resamples=resamples, seed=seed).exp()


@dataclass(frozen=True)
class Items:
    """What a metric is made of.

    Attributes:
        statistic (`str`): `"mean"` of the values; `"perplexity"`, `exp(Σ values / Σ counts)`; `"ratio"`, `Σ values / Σ
            counts`; or `"set"`, one value that belongs to all items together and has no interval.
        values (`list[float]`): One value per item.
        counts (`list[float]`): Tokens behind each value, or for a `"set"` the number of its items; else empty.
        texts (`list[str]`): What the model wrote for each item; else empty.
        chances (`list[float]`): Of choices, the probability that a guess is right; else empty.
        groups (`list[str]`): Of choices, what each is about: those about the same subject are no independent items.
    """

    statistic: Literal["mean", "perplexity", "ratio", "set"]
    values: list[float]
    counts: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def estimate(self) -> Estimate:
        """Value and 95 % bootstrap interval."""
        if self.statistic == "mean":
            return bootstrap_mean(self.values)
        if self.statistic == "perplexity":
            return bootstrap_perplexity(self.values, self.counts)
        if self.statistic == "ratio":
            return bootstrap_ratio(self.values, self.counts)
        return Estimate(self.values[0], self.values[0], self.values[0], int(self.counts[0]))


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    counts_before: Sequence[float] | None = None,
    counts_after: Sequence[float] | None = None,
) -> tuple[Estimate, float]:
    """Difference `after − before` of two means (or means per token) over the same items, resampled together.

    Args:
        before: Value (or sum over tokens) of each item.
        after: The same of the other model, in the same order.
        counts_before: Tokens behind each value of `before`; 1 by default.
        counts_after: Tokens behind each value of `after`.

    Returns:
        `tuple[Estimate, float]`: the difference with its 95 % interval, and a two-sided bootstrap p: twice the smaller
        share of resamples on either side of zero, never below `1 / resamples`.

    Raises:
        ValueError: if the two do not judge the same items, or there are none.
    """
    _check_same_items(before, after)
    counts = [np.ones(len(before)) if given is None else given for given in (counts_before, counts_after)]
    value, samples = bootstrap(
        lambda b, n_b, a, n_a: ratio(a, n_a) - ratio(b, n_b), before, counts[0], after, counts[1]
    )
    tails = min(np.mean(samples <= 0), np.mean(samples >= 0))
    return Estimate.of(value, samples, len(before)), min(1.0, max(2 * float(tails), 1 / RESAMPLES))


def share_left(
    before: Sequence[float],
    after: Sequence[float],
    chances: Sequence[float],
    groups: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
) -> Estimate:
    r"""Share of a margin over chance that is left: `Σ (after − chance) / Σ (before − chance)`.

    Args:
        before: Verdict on each item.
        after: The same of the other model, in the same order.
        chances: Probability that a guess at the item is right.
        groups: What each item is about. Groups are resampled, each with all its items in both models: two questions
            about one subject are no independent items.

    Returns:
        [`Estimate`]: 0 where the second model is at chance, 1 where it is as good as the first, with the 95 % interval of
        a paired bootstrap; `n` counts items. Meaningless where the first is near chance itself.

    Raises:
        ValueError: if there are no items, or the two do not judge the same ones.
    """
    _check_same_items(before, after)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    places = np.array([numbers[group] for group in groups], dtype=int)
    margins = [np.bincount(places, weights=np.subtract(side, chances)) for side in (before, after)]

    def share(first: np.ndarray, second: np.ndarray) -> Any:
        # A share of no margin is as good as infinite.
        return second.sum(-1) / np.maximum(first.sum(-1), 1e-9)

    return Estimate.of(*bootstrap(share, *margins, resamples=resamples), len(before))


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


def entropy(labels: Sequence[str]) -> float:
    """Entropy of how often each label occurs, in nats: 0 where all are the same, `log n` where all differ."""
    shares = np.array(list(Counter(labels).values())) / len(labels)
    return float(-(shares * np.log(shares)).sum()) + 0.0


def _check_same_items(before: Sequence[float], after: Sequence[float]) -> None:
    if len(before) != len(after):
        raise ValueError(f"`before` holds {len(before)} items and `after` {len(after)}: judge the same ones.")


def change(before: Items, after: Items) -> dict[str, Any]:
    """How a metric changed from the reference to the erased model, item by item.

    Returns:
        `dict`: `change`, the difference (for a perplexity, the ratio) with its paired 95 % interval; and `p`,
        uncorrected: McNemar's exact test where the items are verdicts, else the paired bootstrap's, or `None` where
        there is nothing to test (a divergence is never negative; a set is one item).
    """
    if before.statistic == "set":
        value = after.values[0] - before.values[0]
        return {"change": Estimate(value, value, value, int(before.counts[0])).to_dict(), "p": None}
    difference, p = paired_difference(before.values, after.values, before.counts or None, after.counts or None)
    if before.statistic == "perplexity":
        difference = difference.exp()
    elif before.statistic == "ratio":
        return {"change": difference.to_dict(), "p": None}
    elif not before.counts and {*before.values, *after.values} <= {0.0, 1.0}:
        p = mcnemar([bool(value) for value in before.values], [bool(value) for value in after.values])
    return {"change": difference.to_dict(), "p": p}


def against_chance(before: Items, after: Items) -> dict[str, Any]:
    """Where the accuracy of choices stands to a guess.

    Returns:
        `dict`: empty for a metric that is not about choices; else `chance`, and `left`, the share of the reference's
        margin over chance that is left, with its paired 95 % interval over subjects. `left` is `None` where the
        reference itself does not know the answers, as [`knows`] tells: then the metric says nothing.
    """
    if not before.chances:
        return {}
    left = share_left(before.values, after.values, before.chances, before.groups) if is_known(before) else None
    return {"chance": float(np.mean(before.chances)), "left": None if left is None else left.to_dict()}


def is_known(items: Items) -> bool:
    """Whether accuracy lies above chance by at least `LEAST_MARGIN`, and its whole interval lies above chance."""
    metric, chance = items.estimate(), float(np.mean(items.chances))
    return metric.value - chance >= LEAST_MARGIN and metric.low > chance


def with_families(
    items: Mapping[str, Items], before: Mapping[str, Items], roles: Mapping[str, str]
) -> dict[str, Items]:
    """The items, and for each rule `families.erased.<rule>` and `families.unseen.<rule>`: all ways of asking together.

    Args:
        items: Items of one model.
        before: Those of the reference. A bank that it does not know by a rule is left out.
        roles: Role of each bank.
    """
    found = dict(items)
    for role in ("erased", "unseen"):
        for rule in RANKING_RULES:
            names = [f"multiple_choice.{bank}.{rule}" for bank, its in roles.items() if its == role]
            parts = [
                items[name] for name in names if name in before and before[name].chances and is_known(before[name])
            ]
            if parts:
                found[f"families.{role}.{rule}"] = Items(
                    "mean",
                    [value for part in parts for value in part.values],
                    chances=[chance for part in parts for chance in part.chances],
                    groups=[group for part in parts for group in part.groups],
                )
    return found


def correct_p(metrics: Mapping[str, dict[str, Any]]) -> None:
    """Correct the `p` of all metrics that have one by Holm's method, in place."""
    tested = [metric for metric in metrics.values() if metric["p"] is not None]
    for metric, p in zip(tested, holm([metric["p"] for metric in tested]), strict=True):
        metric["p"] = p


def compared(measured: Mapping[Side, Mapping[str, Items]], roles: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The `figures` of a report: metrics of both sides and what they say together, and all ways of asking as one."""
    before, after = (with_families(measured[side], measured["reference"], roles) for side in SIDES)
    metrics = {
        name: {
            "statistic": one.statistic,
            "reference": one.estimate().to_dict(),
            "erased": after[name].estimate().to_dict(),
            **change(one, after[name]),
            **against_chance(one, after[name]),
        }
        for name, one in before.items()
    }
    correct_p(metrics)
    return metrics
