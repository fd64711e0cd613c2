"""The report of a comparison, made from its runs alone: metrics over several seeds, and the rule that ranks settings and methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.report import SCHEMA_VERSION, environment
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
from ..evaluation.verdict import CRITERIA, judge, multiple
from .claims import paper_claims
from .config import METHODS, ComparisonConfig, Reference, from_json


BUDGETS = ("updates", "seconds")
RULE = (
    "Every figure that the verdict holds to a bound is taken as a multiple of that bound (perplexities by their "
    "logarithms); of the concept, that is the share of the margin over chance that is left, in the worst way of asking "
    "that the reference can answer. A criterion's score is its largest multiple, and a setting's the largest of the "
    "three: at most 1 means that all bounds are kept. The lowest wins; of equals the one of the lowest mean over the criteria."
)


class Headline(NamedTuple):
    """A metric on which a rival can beat ELM: its title in the file, that in the terminal if it stands there, and what is better."""

    title: str
    short: str | None = None
    more_is_better: bool = False


HEADLINES = {
    "multiple_choice.{concept}.pmi": Headline("concept by PMI", "concept (PMI)"),
    "multiple_choice.{concept}.log_likelihood": Headline("concept by likelihood"),
    "families.erased.pmi": Headline("all ways of asking by PMI"),
    "families.erased.log_likelihood": Headline("all ways of asking by likelihood"),
    "open_answers.{concept}": Headline("open answers", "named freely"),
    "cloze.{concept}": Headline("cloze"),
    "fluency.greedy.r_ppl": Headline("R-PPL", "R-PPL"),
    "specificity.near": Headline("near knowledge", "near", more_is_better=True),
    "specificity.far": Headline("far knowledge", "far", more_is_better=True),
    "retention.perplexity": Headline("retain perplexity", "retain"),
}


def headlines(concept: str) -> dict[str, Headline]:
    """`HEADLINES` by the names of their metrics in the report."""
    return {pattern.format(concept=concept): headline for pattern, headline in HEADLINES.items()}


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
    count = int(reference.counts[0]) if reference.statistic == "set" else len(reference.values)
    found: dict[str, Any] = {"statistic": reference.statistic}
    for name, values in (("reference", before), ("erased", after), ("change", after - before)):
        found[name] = _estimate(values, count, reference.statistic)
    # All runs count alike, and each answers the questions of the reference.
    parts = ("values", "chances", "groups")
    repeated = replace(reference, **{name: getattr(reference, name) * len(runs) for name in parts})
    found |= against_chance(repeated, replace(repeated, values=[value for run in runs for value in run.values]))
    # Whether the reference knows the answers does not depend on the number of runs.
    return found if "left" not in found or is_known(reference) else found | {"left": None}


def difference(first: Sequence[Items], second: Sequence[Items]) -> dict[str, Any]:
    """How the second method differs from the first on the same seeds and items: a difference, for perplexities a ratio.

    Raises:
        ValueError: if they have not as many seeds.
    """
    if len(first) != len(second):
        raise ValueError(f"`first` has {len(first)} seeds and `second` {len(second)}: compare the same ones.")
    return _estimate(resampled_mean(second) - resampled_mean(first), len(first[0].values), first[0].statistic)


def _estimate(values: np.ndarray, count: int, statistic: str) -> dict[str, Any]:
    """The first value, with the interval of the others."""
    metric = Estimate.of(float(values[0]), values[1:], count)
    return (metric.exp() if statistic == "perplexity" else metric).to_dict()


def with_pools(items: Mapping[str, Items], before: Mapping[str, Items], roles: Mapping[str, str]) -> dict[str, Items]:
    """The items, those of [`with_families`], and PMI verdicts on all banks of knowledge that is kept, near and far, together.

    Args:
        items: Items of one model.
        before: Those of the reference.
        roles: Role of each bank.
    """
    found = with_families(items, before, roles)
    for role in ("near", "far"):
        banks = [items[f"multiple_choice.{bank}.pmi"] for bank, its in roles.items() if its == role]
        if banks:
            found[f"specificity.{role}"] = Items("mean", [value for bank in banks for value in bank.values])
    return found


def score(metrics: Mapping[str, Mapping[str, Any]], roles: Mapping[str, str]) -> dict[str, float]:
    """How far an erasure is from the bounds of [`Criteria`], by `RULE`.

    Args:
        metrics: Metrics with `reference`, `erased` and `change`, and those of choices with `left`.
        roles: Role of each bank.

    Returns:
        `dict[str, float]`: the score of each criterion, their `worst` and their `mean`.
    """
    verdict = judge(metrics, roles)
    checks = {name: [c for c in verdict[name]["checks"] if c.get("counted", True)] for name in CRITERIA}
    scores = {name: max(map(multiple, checks[name]), default=math.nan) for name in CRITERIA}
    return scores | {"worst": max(scores.values()), "mean": sum(scores.values()) / len(scores)}


def choose(scores: Sequence[Mapping[str, float] | None]) -> int | None:
    """Index of the best setting; `None` stands for one that failed, and is returned where all did."""
    ended = [(found["worst"], found["mean"], index) for index, found in enumerate(scores) if found is not None]
    return min(ended)[2] if ended else None


def make_report(
    config: ComparisonConfig, reference: Reference, results: Mapping[str, Mapping[str, Any]], seconds: float | None
) -> dict[str, Any]:
    """The report.

    Args:
        reference: What all methods share.
        results: What [`MethodRun.run`] gives, by method.
        seconds: Budget of the table of equal time.
    """
    suite = reference.suites["test"]
    measured = from_json(reference.items["test"])
    before = with_pools(measured, measured, suite.roles)
    items: dict[str, dict[str, dict[int, dict[str, Items]]]] = {budget: {} for budget in BUDGETS}
    tables: dict[str, dict[str, Any]] = {}
    claims, beaten = [], []
    for budget in BUDGETS:
        rows = {}
        for method, result in results.items():
            entries = _entries(config, method, result, budget)
            items[budget][method] = {
                seed: with_pools(from_json(entry["items"]), measured, suite.roles)
                for seed, entry in entries.items()
                if "items" in entry
            }
            rows[method] = _row(result, entries, before, items[budget][method], suite.roles)
        tables[budget] = {"budget": config.updates if budget == "updates" else seconds, "methods": rows}
        claims += paper_claims(rows, config.concept, budget)
        beaten += _beaten(budget, items[budget], before, config.concept)
    methods = {method: _method(config, method, result) for method, result in results.items()}
    attacks = {method: result["attacks"] for method, result in results.items() if result["attacks"] is not None}
    # The largest peak of a process: at the end of a method's first training, or of its attacks, which come last.
    peaks = [entry["peak_memory_bytes"] for entry in (*methods.values(), *attacks.values())]
    texts = {
        f"training {name}, seed {seed}": info for seed, rows in reference.data.items() for name, info in rows.items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "concept": config.concept,
        "rule": RULE,
        "methods": methods,
        "tables": tables,
        "claims": claims,
        "beaten": beaten,
        "attacks": {
            method: {key: found[key] for key in ("worst_case", "families", "figures", "skipped")}
            for method, found in attacks.items()
        },
        "samples": _samples(suite.concept_prompts, before, items["updates"]),
        "roles": dict(suite.roles),
        "recipe": asdict(config),
        "reference_sha256": reference.model,
        "datasets": {name: info for name, info in reference.questions["test"].items() if "sha256" in info} | texts,
        **environment({}),
        "seconds": {method: entry["total_seconds"] for method, entry in methods.items()},
        "peak_memory_bytes": max((peak for peak in peaks if peak is not None), default=0),
    }


def _entries(
    config: ComparisonConfig, method: str, result: Mapping[str, Any], budget: str
) -> dict[int, dict[str, Any]]:
    """What the final runs of a method left of a budget, by seed."""
    # For the method that sets the time, both budgets are the same.
    name = "updates" if method == config.clock else budget
    budgets = {seed: result["finals"].get(str(seed), {}).get("budgets", {}) for seed in config.seeds}
    return {seed: found[name] for seed, found in budgets.items() if name in found}


def _row(
    result: Mapping[str, Any],
    entries: Mapping[int, Mapping[str, Any]],
    before: Mapping[str, Items],
    items: Mapping[int, Mapping[str, Items]],
    roles: Mapping[str, str],
) -> dict[str, Any]:
    """A method's row of a table; `failed` says why, by seed, or under `"search"` if no setting could be chosen."""
    ended = [entry for entry in entries.values() if "failed" not in entry]
    failed = {str(seed): entry["failed"] for seed, entry in entries.items() if "failed" in entry}
    if result["chosen"] is None:
        failed = {"search": "; ".join(entry["failed"] for entry in result["search"])}
    row: dict[str, Any] = {
        "updates": [entry["updates"] for entry in ended],
        "seconds": [entry["training_seconds"] for entry in ended],
        "failed": failed,
        "figures": {},
        "verdict": None,
        "score": None,
    }
    if items:
        figures = {name: summarize(found, [run[name] for run in items.values()]) for name, found in before.items()}
        row |= {"figures": figures, "verdict": judge(figures, roles), "score": score(figures, roles)}
    return row


def _method(config: ComparisonConfig, method: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What a method was given, what its search found, and what it costs."""
    search, finals, chosen = result["search"], list(result["finals"].values()), result["chosen"]
    args = config.arguments(method, 0, seed=0, output_dir="unused")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    trained = [
        (entry["training_seconds"] - final["setup"]) / (entry["updates"] * batch)
        for final in finals
        if "failed" not in (entry := final["budgets"]["updates"])
    ]
    attacked = result["attacks"]["seconds"]["total"] if result["attacks"] is not None else 0.0
    return {
        "label": METHODS[method].label,
        "adapter": dict(config.lora_shape(method)),
        "search": search,
        "chosen": chosen,
        "settings": None if chosen is None else config.chosen(method, chosen),
        "setup_seconds": _mean([final["setup"] for final in finals]),
        "seconds_per_sample": _mean(trained),
        "total_seconds": sum(run["seconds"] for run in (*search, *finals)) + attacked,
        **{
            key: max((run[key] for run in (*search, *finals) if run.get(key) is not None), default=None)
            for key in ("peak_memory_bytes", "peak_device_memory_bytes")
        },
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _beaten(
    budget: str, items: Mapping[str, Mapping[int, Mapping[str, Items]]], before: Mapping[str, Items], concept: str
) -> list[dict[str, Any]]:
    """Figures on which a rival is better than ELM, beyond the 95 % interval of their paired difference."""
    own = items.get("elm", {})
    found = []
    for method, runs in items.items():
        seeds = [seed for seed in own if seed in runs]
        if method == "elm" or not seeds:
            continue
        for name, headline in headlines(concept).items():
            if name not in before:
                continue
            ours, theirs = ([part[seed][name] for seed in seeds] for part in (own, runs))
            apart = difference(ours, theirs)
            even = 1.0 if before[name].statistic == "perplexity" else 0.0
            if apart["low"] > even if headline.more_is_better else apart["high"] < even:
                found.append(
                    {
                        "budget": budget,
                        "method": method,
                        "figure": name,
                        "statistic": before[name].statistic,
                        "rival": summarize(before[name], theirs)["erased"],
                        "elm": summarize(before[name], ours)["erased"],
                        "difference": apart,
                    }
                )
    return found


def _samples(
    prompts: list[str], before: Mapping[str, Items], items: Mapping[str, Mapping[int, Mapping[str, Items]]]
) -> list[dict[str, Any]]:
    """What the reference and the first seed of each method answer to three prompts about the concept."""
    name = "fluency.greedy.r_ppl"
    first = {method: next(iter(runs.values())) for method, runs in items.items() if runs}
    return [
        {
            "prompt": prompt,
            "reference": before[name].texts[index],
            "methods": {method: found[name].texts[index] for method, found in first.items()},
        }
        for index, prompt in enumerate(prompts[:3])
    ]
