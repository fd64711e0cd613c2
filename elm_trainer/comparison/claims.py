"""The paper's claims about the methods, each tested by a stated rule on metrics of several seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..evaluation.statistics import (
    RESAMPLES,
    Estimate,
    Items,
    against_chance,
    bootstrap,
    is_known,
    ratio,
    with_families,
)
from ..evaluation.verdict import CRITERIA, FAILS, HOLDS, UNCERTAIN, Criteria


# Knowledge that is not erased, over all its banks.
POOLED = {"specificity.near": "near", "specificity.far": "far"}


def resampled_mean(runs: Sequence[Items]) -> np.ndarray:
    """Mean over seeds of the statistic (for perplexities its logarithm), then its resamples: `[1 + RESAMPLES]`.

    A resample draws items with replacement, and seeds with replacement; every seed was asked the same items. The draws are
    the same for all methods, so that their differences are paired.
    """
    values = np.stack([_resampled(items) for items in runs])  # [seeds, 1 + RESAMPLES]
    if len(runs) == 1:
        return values[0]
    seeds = np.random.default_rng([0, len(runs)]).integers(0, len(runs), size=(RESAMPLES, len(runs)))
    resamples = values[:, 1:][seeds, np.arange(RESAMPLES)[:, None]].mean(1)
    return np.concatenate([values[:, 0].mean(keepdims=True), resamples])


def _resampled(items: Items) -> np.ndarray:
    values = np.asarray(items.values, dtype=float)
    if items.statistic == "set":
        return np.full(1 + RESAMPLES, values[0])
    value, samples = bootstrap(ratio, values, items.counts or np.ones(len(values)))
    return np.concatenate([[value], samples])


def summarize(reference: Items, runs: Sequence[Items]) -> dict[str, Any]:
    """`statistic`, `reference`, `erased` and `change` of a metric, as in a report of [`evaluate_erasure`].

    Args:
        runs: The erased model's, one for each seed.
    """
    before, after = resampled_mean([reference]), resampled_mean(runs)
    logarithmic = reference.statistic == "perplexity"
    count = int(reference.counts[0]) if reference.statistic == "set" else len(reference.values)
    return {
        "statistic": reference.statistic,
        "reference": _metric(before, count, logarithmic),
        "erased": _metric(after, count, logarithmic),
        "change": _metric(after - before, count, logarithmic),
        **_against_chance(reference, runs),
    }


def difference(first: Sequence[Items], second: Sequence[Items]) -> dict[str, Any]:
    """How the second method differs from the first on the same seeds and items: a difference, for perplexities a ratio.

    Raises:
        ValueError: if they have not as many seeds.
    """
    if len(first) != len(second):
        raise ValueError(f"`first` has {len(first)} seeds and `second` {len(second)}: compare the same ones.")
    change = resampled_mean(second) - resampled_mean(first)
    return _metric(change, len(first[0].values), first[0].statistic == "perplexity")


def _against_chance(reference: Items, runs: Sequence[Items]) -> dict[str, Any]:
    """As [`against_chance`]; each run answers the questions of the reference, and all runs count alike."""
    parts = ("values", "chances", "groups")
    repeated = replace(reference, **{name: getattr(reference, name) * len(runs) for name in parts})
    found = against_chance(repeated, replace(repeated, values=[value for run in runs for value in run.values]))
    # Whether the reference knows the answers does not depend on the number of runs.
    return found if not found or is_known(reference) else found | {"left": None}


def with_pools(items: Mapping[str, Items], before: Mapping[str, Items], roles: Mapping[str, str]) -> dict[str, Items]:
    """The items, those of [`with_families`], and those of `POOLED`: PMI verdicts on all banks of a role together.

    Args:
        items: Items of one model.
        before: Those of the reference.
        roles: Role of each bank.
    """
    pooled = {}
    for name, role in POOLED.items():
        banks = [items[f"multiple_choice.{bank}.pmi"] for bank, found in roles.items() if found == role]
        if banks:
            pooled[name] = Items("mean", [value for bank in banks for value in bank.values])
    return {**with_families(items, before, roles), **pooled}


def _metric(values: np.ndarray, count: int, logarithmic: bool) -> dict[str, Any]:
    """The first value, with the interval of the others."""
    metric = Estimate.of(float(values[0]), values[1:], count)
    return (metric.exp() if logarithmic else metric).to_dict()


# Rows of a table by method, each with `figures`, `verdict` and `failed`.
Rows: TypeAlias = Mapping[str, Mapping[str, Any]]
BOUNDS = Criteria()
# R-PPL from which on text is called gibberish, as a multiple of the reference's: beyond what the verdict allows.
GIBBERISH = 1.5
R_PPL = "fluency.greedy.r_ppl"


@dataclass(frozen=True)
class Evidence:
    """A value that is held to a bound.

    Attributes:
        what (`str`): What is measured.
        value (`float`), low (`float`), high (`float`): The value and its 95 % interval.
        bound (`float`): The bound.
        above (`bool`): Whether the claim wants it above the bound, or at most there.
    """

    what: str
    value: float
    low: float
    high: float
    bound: float
    above: bool

    @property
    def holds(self) -> bool:
        """Whether the value is on the claimed side."""
        return (self.value > self.bound) is self.above

    @property
    def certain(self) -> bool:
        """Whether the interval is on the same side as the value."""
        return self.low > self.bound if self.value > self.bound else self.high <= self.bound


class Claim(NamedTuple):
    """A claim about methods, in words, and how it is held to the metrics."""

    methods: tuple[str, ...]
    text: str
    rule: str
    evidence: Callable[[Rows, str], list[Evidence]]


def gibberish(rows: Rows, concept: str) -> list[Evidence]:
    """RMU is above the R-PPL of gibberish, ELM is not."""
    return [
        _held("RMU, R-PPL", _change(rows, "rmu", R_PPL), GIBBERISH, above=True),
        _held("ELM, R-PPL", _change(rows, "elm", R_PPL), GIBBERISH),
    ]


def same_choices(rows: Rows, concept: str) -> list[Evidence]:
    """WHP loses no more of the concept than may be lost of neighboring knowledge."""
    return [
        _held(f"WHP, fall by {rule}", _fall(rows, "whp", f"multiple_choice.{concept}.{rule}"), BOUNDS.near)
        for rule in ("pmi", "log_likelihood")
    ]


def fluent_and_unforgetting(rows: Rows, concept: str) -> list[Evidence]:
    """RepNoise is below the R-PPL of gibberish, and loses at most half of what ELM loses."""
    name = f"multiple_choice.{concept}.pmi"
    return [
        _held("RepNoise, R-PPL", _change(rows, "repnoise", R_PPL), GIBBERISH),
        _held("RepNoise, fall by pmi", _fall(rows, "repnoise", name), _fall(rows, "elm", name)["value"] / 2),
    ]


CLAIMS = (
    Claim(
        ("rmu", "elm"),
        "RMU's text about the concept turns to gibberish, ELM's stays fluent",
        f"R-PPL of greedy answers, as a multiple of the reference's: above {GIBBERISH:g} for RMU, at most that for ELM",
        gibberish,
    ),
    Claim(
        ("whp",),
        "WHP answers multiple choice about the concept as before",
        f"its accuracy falls by at most {BOUNDS.near:g}, by PMI and by log-likelihood",
        same_choices,
    ),
    Claim(
        ("repnoise", "elm"),
        "RepNoise keeps fluency and forgets little",
        f"R-PPL at most {GIBBERISH:g} times the reference's, and a fall of PMI accuracy at most half of ELM's",
        fluent_and_unforgetting,
    ),
)


def paper_claims(rows: Rows, concept: str, budget: str) -> list[dict[str, Any]]:
    """The claims of the ELM paper (arXiv 2410.02760) that can be told from one table.

    Args:
        rows: Rows of the table by method, each with `figures`, `verdict` and `failed`.
        budget: Which table it is.

    Returns:
        `list[dict]`: each with `budget`, `claim`, `rule`, `held` (`None` where a method it speaks of is not compared or
        failed), `certain` (the intervals say the same as the values), and `evidence`.
    """
    found = []
    for claim in CLAIMS:
        entry: dict[str, Any] = {"budget": budget, "claim": claim.text, "rule": claim.rule}
        entry |= {"held": None, "certain": None, "evidence": []}
        if all(_measured(rows, method) for method in claim.methods):
            parts = claim.evidence(rows, concept)
            held = all(part.holds for part in parts)
            # One part that fails for certain settles it.
            certain = (
                all(part.certain for part in parts) if held else any(part.certain for part in parts if not part.holds)
            )
            entry |= {"held": held, "certain": certain}
            entry["evidence"] = [vars(part) | {"holds": part.holds, "certain": part.certain} for part in parts]
        found.append(entry)
    return [*found, only_good(rows, budget)]


def only_good(rows: Rows, budget: str) -> dict[str, Any]:
    """The claim that ELM alone is good at all three criteria, as [`paper_claims`] returns it."""
    entry: dict[str, Any] = {
        "budget": budget,
        "claim": "ELM is the only one good at innocence, seamlessness and specificity",
        "rule": "all three criteria hold for ELM, and for no other method",
        "held": None,
        "certain": None,
        "evidence": [],
    }
    rivals = [method for method in rows if method != "elm" and _measured(rows, method)]
    if not _measured(rows, "elm") or not rivals:
        return entry
    states = {method: _worst_state(rows[method]["verdict"]) for method in ("elm", *rivals)}
    rival_holds = any(states[method] == HOLDS for method in rivals)
    held = states["elm"] == HOLDS and not rival_holds
    certain = all(states[method] == FAILS for method in rivals) if held else rival_holds or states["elm"] == FAILS
    return entry | {
        "held": held,
        "certain": certain,
        "evidence": [
            {"what": method, "state": state} | {name: rows[method]["verdict"][name]["state"] for name in CRITERIA}
            for method, state in states.items()
        ],
    }


def _worst_state(verdict: Mapping[str, Any]) -> str:
    """What the three criteria say together; what was not measured is uncertain."""
    found = {verdict[name]["state"] for name in CRITERIA}
    return FAILS if FAILS in found else HOLDS if found == {HOLDS} else UNCERTAIN


def _measured(rows: Rows, method: str) -> bool:
    """Whether a method is compared and none of its seeds failed."""
    return method in rows and bool(rows[method]["figures"]) and not rows[method]["failed"]


def _held(what: str, metric: Mapping[str, float], bound: float, *, above: bool = False) -> Evidence:
    return Evidence(what, metric["value"], metric["low"], metric["high"], bound, above)


def _change(rows: Rows, method: str, name: str) -> Mapping[str, float]:
    return rows[method]["figures"][name]["change"]


def _fall(rows: Rows, method: str, name: str) -> dict[str, float]:
    change = _change(rows, method, name)
    return {"value": -change["value"], "low": -change["high"], "high": -change["low"]}
