"""The report of a comparison, made from its runs alone, and the rule that ranks settings and methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..evaluation.report import SCHEMA_VERSION, environment
from ..evaluation.statistics import Items
from ..evaluation.verdict import CRITERIA, judge, multiple
from .claims import difference, paper_claims, summarize, with_pools
from .config import METHODS, ComparisonConfig
from .training import Reference, from_json


RULE = (
    "Every figure that the verdict holds to a bound is taken as a multiple of that bound (perplexities by their "
    "logarithms); of the concept, that is the share of the margin over chance that is left, in the worst way of asking "
    "that the reference can answer. A criterion's score is its largest multiple, and a setting's the largest of the "
    "three: at most 1 means that all bounds are kept. The lowest wins; of equals the one of the lowest mean over the criteria."
)


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


BUDGETS = ("updates", "seconds")
_SAMPLES = 3
# The metrics on which a rival can beat ELM, and whether the larger one is better.
HEADLINES = {
    "multiple_choice.{concept}.pmi": False,
    "multiple_choice.{concept}.log_likelihood": False,
    "families.erased.pmi": False,
    "families.erased.log_likelihood": False,
    "open_answers.{concept}": False,
    "cloze.{concept}": False,
    "fluency.greedy.r_ppl": False,
    "specificity.near": True,
    "specificity.far": True,
    "retention.perplexity": False,
}


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
    roles = suite.roles
    measured = from_json(reference.items["test"])
    before = with_pools(measured, measured, roles)
    items: dict[str, dict[str, dict[int, dict[str, Items]]]] = {budget: {} for budget in BUDGETS}
    tables: dict[str, dict[str, Any]] = {}
    for budget in BUDGETS:
        rows = {}
        for method, result in results.items():
            entries = _entries(config, method, result, budget)
            items[budget][method] = {
                seed: with_pools(from_json(entry["items"]), measured, roles)
                for seed, entry in entries.items()
                if "items" in entry
            }
            rows[method] = _row(result, entries, before, items[budget][method], roles)
        tables[budget] = {"budget": config.updates if budget == "updates" else seconds, "methods": rows}
    methods = {method: _method(config, method, result) for method, result in results.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "concept": config.concept,
        "rule": RULE,
        "methods": methods,
        "tables": tables,
        "claims": [
            claim for budget in BUDGETS for claim in paper_claims(tables[budget]["methods"], config.concept, budget)
        ],
        "beaten": [entry for budget in BUDGETS for entry in _beaten(budget, items[budget], before, config.concept)],
        "attacks": {
            method: {key: result["attacks"][key] for key in ("worst_case", "families", "figures", "skipped")}
            for method, result in results.items()
            if result["attacks"] is not None
        },
        "samples": _samples(suite.concept_prompts, before, items["updates"]),
        "roles": dict(roles),
        "recipe": asdict(config),
        "reference_sha256": reference.model,
        "datasets": {name: info for name, info in reference.questions["test"].items() if "sha256" in info}
        | {
            f"training {name}, seed {seed}": info
            for seed, texts in reference.data.items()
            for name, info in texts.items()
        },
        **environment({}),
        "seconds": {method: entry["total_seconds"] for method, entry in methods.items()},
        "peak_memory_bytes": _peak(results, methods),
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
        row["figures"] = {
            name: summarize(found, [run[name] for run in items.values()]) for name, found in before.items()
        }
        row["verdict"] = judge(row["figures"], roles)
        row["score"] = score(row["figures"], roles)
    return row


def _method(config: ComparisonConfig, method: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What a method was given, what its search found, and what it costs."""
    finals = list(result["finals"].values())
    args = config.arguments(method, 0, seed=0, output_dir="unused")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    runs = [*result["search"], *finals]
    peaks = {
        key: max((run[key] for run in runs if run.get(key) is not None), default=None)
        for key in ("peak_memory_bytes", "peak_device_memory_bytes")
    }
    trained = [
        (entry["training_seconds"] - final["setup"]) / (entry["updates"] * batch)
        for final in finals
        if "failed" not in (entry := final["budgets"]["updates"])
    ]
    return {
        "label": METHODS[method].label,
        "adapter": dict(config.lora_shape(method)),
        "search": result["search"],
        "chosen": result["chosen"],
        "settings": None if result["chosen"] is None else config.chosen(method, result["chosen"]),
        "setup_seconds": _mean([final["setup"] for final in finals]),
        "seconds_per_sample": _mean(trained),
        "total_seconds": sum(entry["seconds"] for entry in result["search"])
        + sum(final["seconds"] for final in finals)
        + (result["attacks"]["seconds"]["total"] if result["attacks"] is not None else 0.0),
        **peaks,
    }


def _peak(results: Mapping[str, Mapping[str, Any]], methods: Mapping[str, Mapping[str, Any]]) -> int:
    """Largest peak of a process: at the end of a method's first training, or of its attacks, which come last."""
    peaks = [entry["peak_memory_bytes"] for entry in methods.values()]
    peaks += [result["attacks"]["peak_memory_bytes"] for result in results.values() if result["attacks"] is not None]
    return max((peak for peak in peaks if peak is not None), default=0)


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
        for pattern, larger in HEADLINES.items():
            name = pattern.format(concept=concept)
            if name not in before:
                continue
            ours, theirs = ([part[seed][name] for seed in seeds] for part in (own, runs))
            apart = difference(ours, theirs)
            even = 1.0 if before[name].statistic == "perplexity" else 0.0
            if apart["low"] > even if larger else apart["high"] < even:
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
    """What the reference and the first seed of each method answer to the same prompts about the concept."""
    name = "fluency.greedy.r_ppl"
    first = {method: next(iter(runs.values())) for method, runs in items.items() if runs}
    return [
        {
            "prompt": prompt,
            "reference": before[name].texts[index],
            "methods": {method: found[name].texts[index] for method, found in first.items()},
        }
        for index, prompt in enumerate(prompts[:_SAMPLES])
    ]
