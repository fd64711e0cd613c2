"""Every figure of a published report as a result of the card's model-index."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.tables import NOT_MEASURED
from ..evaluation.verdict import CRITERIA, FAILS, UNCERTAIN, read_verdict
from .generated import RESULTS


TASK = "text-generation"
# `config` of the data sets of the verdict and of the attacks; those of an evaluation are named as in the report.
VERDICT_CONFIG, ATTACKS_CONFIG = "criteria", "attacks"


def report_results(report: Mapping[str, Any]) -> list[EvalResult]:
    """Evaluation figures, attack figures and verdict of a published report.

    Results on one data set stand together, as the model-index groups them. Its `dataset_config` is the name that the
    report gives to what was asked, and `dataset_args` hold its size, SHA-256 and, for a bank, its role. `metric_value`
    is the erased model's figure, and `metric_args` hold the rest.
    """
    by_config: dict[str, list[EvalResult]] = {}
    for name, figure in report["figures"].items():
        config, bank = _asked(name)
        info = report["datasets"].get(config, {})
        role = bank if name.startswith("families.") else report["roles"].get(bank)
        args = {"size": info.get("size"), "sha256": info.get("sha256"), "role": role}
        others = {side: figure[side] for side in ("reference", "change")}
        result = _result(config, info.get("revision"), args, _metric(name), name, figure, others, _left(figure))
        by_config.setdefault(config, []).append(result)
    if report["attacks"] is not None:
        info = report["attacks"]["datasets"]["questions"]
        args = {"size": info["size"], "sha256": info["sha256"]}
        by_config[ATTACKS_CONFIG] = [
            _result(
                ATTACKS_CONFIG, info["revision"], args, "accuracy", name, figure,
                {side: figure[side] for side in ("reference", "unattacked")},
                {key: figure[key] for key in ("family", "metric", "brings_back")},
            )
            for name, figure in report["attacks"]["figures"].items()
        ]  # fmt: skip
    verdict = read_verdict(report)
    bounds = {name: finite(bound) for name, bound in verdict["criteria"].items()}
    by_config[VERDICT_CONFIG] = [_verdict(name, verdict[name], bounds) for name in CRITERIA]
    return [result for results in by_config.values() for result in results]


def finite(value: float) -> float | int | str:
    """A number as metadata can hold it: the Hub turns them into JSON, which knows no infinity."""
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else str(float(value))


def _result(
    config: str,
    revision: str | None,
    dataset_args: Mapping[str, Any],
    metric: str,
    name: str,
    figure: Mapping[str, Any],
    others: Mapping[str, Mapping[str, float] | None],
    more: Mapping[str, Any],
) -> EvalResult:
    args: dict[str, Any] = {"n": figure["erased"]["n"], "interval": _interval(figure["erased"])}
    for side, other in others.items():
        if other is not None:
            args |= {side: finite(other["value"]), f"{side}_interval": _interval(other)}
    if figure["p"] is not None:
        args["p"] = finite(figure["p"])
    return EvalResult(
        task_type=TASK,
        dataset_type=RESULTS,
        dataset_name=config,
        dataset_config=config,
        dataset_revision=revision,
        dataset_args={key: value for key, value in dataset_args.items() if value is not None} or None,
        metric_type=metric,
        metric_name=name,
        metric_value=finite(figure["erased"]["value"]),
        metric_args=args | dict(more),
    )


def _verdict(name: str, found: Mapping[str, Any], bounds: Mapping[str, Any]) -> EvalResult:
    checks: Sequence[Mapping[str, Any]] = found["checks"]
    return EvalResult(
        task_type=TASK,
        dataset_type=RESULTS,
        dataset_name=VERDICT_CONFIG,
        dataset_config=VERDICT_CONFIG,
        dataset_args=dict(bounds),
        metric_type=name,
        metric_name=name,
        metric_value=found["state"] or NOT_MEASURED,
        metric_args={
            state: [check["figure"] for check in checks if check["state"] == state] for state in (FAILS, UNCERTAIN)
        },
    )


def _left(figure: Mapping[str, Any]) -> dict[str, Any]:
    """Of choices: the probability of a guess, and the share of the margin over it that is left, where that counts."""
    if "chance" not in figure:
        return {}
    found: dict[str, Any] = {"chance": finite(figure["chance"]), "counted": figure["left"] is not None}
    if figure["left"] is not None:
        found |= {"left": finite(figure["left"]["value"]), "left_interval": _interval(figure["left"])}
    return found


def _asked(name: str) -> tuple[str, str]:
    """What a figure was measured on, by the name it has among the report's data sets, and the bank it belongs to."""
    kind, _, rest = name.partition(".")
    bank = rest.partition(".")[0]
    if kind == "multiple_choice":
        return f"bank {bank}", bank
    if kind == "families":
        return f"all {bank} banks that the unmodified model knows", bank
    if kind == "open_answers":
        return f"open questions {bank}", bank
    if kind == "cloze":
        return f"cloze {bank}", bank
    return ("texts retain" if kind == "retention" else "texts concept prompts"), bank


def _metric(name: str) -> str:
    """The usual name of the metric where it has one, else what the figure calls it."""
    kind, _, rest = name.partition(".")
    if kind in ("multiple_choice", "families") or (kind in ("open_answers", "cloze") and "." not in rest):
        return "accuracy"
    if kind in ("open_answers", "cloze"):
        return rest.split(".")[1]
    metric = rest.split(".")[1] if kind == "fluency" else rest
    return {"r_ppl": "perplexity", "kl": "kl_divergence"}.get(metric, metric)


def _interval(figure: Mapping[str, float]) -> list[float | int | str]:
    return [finite(figure["low"]), finite(figure["high"])]
