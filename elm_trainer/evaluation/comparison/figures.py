"""Figures of several seeds on the same items: means over seeds, with intervals over seeds and items."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..measures import Items, against_chance, knows, with_families
from ..statistics import Figure


RESAMPLES = 2000
# Knowledge that is not erased, over all its banks.
POOLED = {"specificity.near": "near", "specificity.far": "far"}


class Resampling:
    """The resamples of one comparison: the same for all methods, so that their differences are paired.

    A resample draws items with replacement, and seeds with replacement; every seed was asked the same items.

    Args:
        seeds (`int`): Seeds of a method.
        resamples (`int`, *optional*, defaults to `2000`): Number of resamples.
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.
    """

    def __init__(self, seeds: int, *, resamples: int = RESAMPLES, seed: int = 0):
        self._resamples, self._seed = resamples, seed
        self._seeds = np.random.default_rng([seed, seeds]).integers(0, seeds, size=(resamples, seeds))

    def mean(self, runs: Sequence[Items]) -> tuple[float, np.ndarray]:
        """Mean over seeds of the statistic (for perplexities its logarithm), and its resamples `[resamples]`.

        Args:
            runs (`Sequence[Items]`): The items of each seed; a single one stands for all seeds (the reference).
        """
        found = [self._statistic(items) for items in runs]
        values = np.array([value for value, _ in found])
        samples = np.stack([sample for _, sample in found])  # [seeds, resamples]
        if len(runs) == 1:
            return float(values[0]), samples[0]
        return float(values.mean()), samples[self._seeds, np.arange(self._resamples)[:, None]].mean(1)

    def _statistic(self, items: Items) -> tuple[float, np.ndarray]:
        values = np.asarray(items.values, dtype=float)
        if items.statistic == "set":
            return float(values[0]), np.full(self._resamples, values[0])
        counts = np.asarray(items.counts, dtype=float) if items.counts else np.ones(len(values))
        rows = np.random.default_rng(self._seed).integers(0, len(values), size=(self._resamples, len(values)))
        return float(values.sum() / counts.sum()), values[rows].sum(1) / np.maximum(counts[rows].sum(1), 1e-12)


def summarise(reference: Items, runs: Sequence[Items]) -> dict[str, Any]:
    """`statistic`, `reference`, `erased` and `change` of a figure, as in a report of [`evaluate_erasure`].

    Args:
        reference (`Items`): The reference's items.
        runs (`Sequence[Items]`): The erased model's, one for each seed.
    """
    resampling = Resampling(len(runs))
    before, after = resampling.mean([reference]), resampling.mean(runs)
    logarithmic = reference.statistic == "perplexity"
    count = int(reference.counts[0]) if reference.statistic == "set" else len(reference.values)
    return {
        "statistic": reference.statistic,
        "reference": _figure(*before, count, logarithmic),
        "erased": _figure(*after, count, logarithmic),
        "change": _figure(after[0] - before[0], after[1] - before[1], count, logarithmic),
        **_against_chance(reference, runs),
    }


def difference(first: Sequence[Items], second: Sequence[Items]) -> dict[str, Any]:
    """How the second method differs from the first on the same seeds and items: a difference, for perplexities a ratio.

    Raises:
        ValueError: if they have not as many seeds.
    """
    if len(first) != len(second):
        raise ValueError(f"`first` has {len(first)} seeds and `second` {len(second)}: compare the same ones.")
    resampling = Resampling(len(first))
    before, after = resampling.mean(first), resampling.mean(second)
    logarithmic = first[0].statistic == "perplexity"
    return _figure(after[0] - before[0], after[1] - before[1], len(first[0].values), logarithmic)


def _against_chance(reference: Items, runs: Sequence[Items]) -> dict[str, Any]:
    """As [`against_chance`]; each run answers the questions of the reference, and all runs count alike."""
    repeated = replace(
        reference,
        values=reference.values * len(runs),
        chances=reference.chances * len(runs),
        groups=reference.groups * len(runs),
    )
    found = against_chance(repeated, replace(repeated, values=[value for run in runs for value in run.values]))
    # Whether the reference knows the answers does not depend on the number of runs.
    return found if not found or knows(reference) else found | {"left": None}


def with_pools(items: Mapping[str, Items], before: Mapping[str, Items], roles: Mapping[str, str]) -> dict[str, Items]:
    """The items, those of [`with_families`], and those of `POOLED`: PMI verdicts on all banks of a role together.

    Args:
        items (`Mapping[str, Items]`): Items of one model.
        before (`Mapping[str, Items]`): Those of the reference.
        roles (`Mapping[str, str]`): Role of each bank.
    """
    pooled = {}
    for name, role in POOLED.items():
        banks = [items[f"multiple_choice.{bank}.pmi"] for bank, found in roles.items() if found == role]
        if banks:
            pooled[name] = Items("mean", [value for bank in banks for value in bank.values])
    return {**with_families(items, before, roles), **pooled}


def _figure(value: float, samples: np.ndarray, count: int, logarithmic: bool) -> dict[str, Any]:
    bounds = np.array([value, *np.percentile(samples, [2.5, 97.5])])
    value, low, high = (np.exp(bounds) if logarithmic else bounds).tolist()
    return Figure(value, low, high, count).to_dict()
