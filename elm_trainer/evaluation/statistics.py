"""Measured values, the items that they are made of, their 95 % bootstrap intervals, and what the items of both sides say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from pandas import factorize
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
    """A statistic of items, `[...]`, and the same of resamples of these items, `[..., resamples]`.

    Calls with the same seed and number of items draw the same items, so that their resamples are paired.

    Args:
        statistic: Takes the columns, and reduces their last axis.
        *columns (array): What is known of each item, `[..., items]`.

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
    """Mean with the percentile interval over resampled items."""
    return bootstrap_ratio(values, np.ones(len(values)), resamples=resamples, seed=seed)


def bootstrap_ratio(
    sums: Sequence[float], counts: Sequence[float] | np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """`Σ sums / Σ counts`, e.g. a mean per token, with the interval over resampled texts."""
    if not np.sum(counts):
        raise ValueError("There is nothing to average: measure at least one item.")
    return Estimate.of(*bootstrap(ratio, sums, counts, resamples=resamples, seed=seed), len(sums))


def bootstrap_perplexity(nlls: Sequence[float], tokens: Sequence[float]) -> Estimate:
    """`exp(Σ nlls / Σ tokens)` with the interval over resampled texts; `nlls` are sums in nats, one per text."""
    return bootstrap_ratio(nlls, tokens).exp()


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


def share_left(
    before: Sequence[float],
    after: Sequence[float],
    chances: Sequence[float],
    groups: Sequence[str],
    *,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Share of a margin over chance that is left: `Σ (after − chance) / Σ (before − chance)`.

    It is 0 where the second model is at chance, 1 where it is as good as the first, and meaningless where the first is near
    chance itself.

    Args:
        before, after: Verdict on each item, of one model and the other.
        chances: Probability that a guess at the item is right.
        groups: What each item is about. Groups are resampled, each with all its items in both models: two questions
            about one subject are no independent items. `n` counts items all the same.
    """
    _check_same_items(before, after)
    places, _ = factorize(np.array(groups, dtype=object))
    margins = [np.bincount(places, weights=np.subtract(side, chances)) for side in (before, after)]

    def share(first: np.ndarray, second: np.ndarray) -> Any:
        # A share of no margin is as good as infinite.
        return second.sum(-1) / np.maximum(first.sum(-1), 1e-9)

    return Estimate.of(*bootstrap(share, *margins, resamples=resamples), len(before))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided p of McNemar's exact test that as many questions turned right as turned wrong."""
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


def _check_same_items(before: Sequence[float], after: Sequence[float]) -> None:
    if len(before) != len(after):
        raise ValueError(f"`before` holds {len(before)} items and `after` {len(after)}: judge the same ones.")


def change(before: Items, after: Items) -> dict[str, Any]:
    """How a metric changed from the reference to the erased model, item by item, both resampled together.

    Returns:
        `dict`: `change`, the difference (for a perplexity, the ratio) with its paired 95 % interval; and `p`,
        uncorrected: McNemar's exact test where the items are verdicts, else twice the smaller share of resamples on either
        side of zero, never below `1 / resamples`, or `None` where there is nothing to test (a divergence is never negative;
        a set is one item).
    """
    if before.statistic == "set":
        value = after.values[0] - before.values[0]
        return {"change": Estimate(value, value, value, int(before.counts[0])).to_dict(), "p": None}
    _check_same_items(before.values, after.values)
    columns = [column for one in (before, after) for column in (one.values, one.counts or np.ones(len(one.values)))]
    value, samples = bootstrap(lambda b, n_b, a, n_a: ratio(a, n_a) - ratio(b, n_b), *columns)
    difference = Estimate.of(value, samples, len(before.values))
    if before.statistic == "ratio":
        return {"change": difference.to_dict(), "p": None}
    p = min(1.0, max(2 * float(min(np.mean(samples <= 0), np.mean(samples >= 0))), 1 / RESAMPLES))
    if before.statistic == "perplexity":
        difference = difference.exp()
    elif not before.counts and {*before.values, *after.values} <= {0.0, 1.0}:
        p = mcnemar([bool(value) for value in before.values], [bool(value) for value in after.values])
    return {"change": difference.to_dict(), "p": p}


def against_chance(before: Items, after: Items) -> dict[str, Any]:
    """Where the accuracy of choices stands to a guess.

    Returns:
        `dict`: empty for a metric that is not about choices; else `chance`, and `left`, the share of the reference's
        margin over chance that is left, with its paired 95 % interval over subjects. `left` is `None` where the
        reference itself does not know the answers, as [`is_known`] tells: then the metric says nothing.
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

    A bank that the reference, with the items `before`, does not know by a rule is left out.
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
