"""Reports: one JSON schema, with what identifies models, questions and machine; and the comparison of two reports."""

import hashlib
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict
from peft.utils.integrations import gather_params_ctx
from scipy.stats import sem

from ..data.questions import Question
from ..files import read_object
from ..fingerprint import adapter_fingerprint, model_fingerprint
from .pair import ModelPair
from .statistics import Items, change, correct_p
from .suite import EvaluationSuite


SCHEMA_VERSION = 2
KINDS = ("evaluation", "attacks", "comparison", "gold-standard")
PACKAGES = ("elm-trainer", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


# How the names of data sets begin that were asked.
_ASKED = ("bank", "open", "cloze", "texts", "benchmark", "harness")
# Parts of a report, and what each of their own parts must be.
_FORMS: dict[str, tuple[type, type | None]] = {
    "reference_sha256": (str, None),
    "erased_sha256": (str, None),
    "figures": (dict, dict),
    "items": (dict, dict),
    "datasets": (dict, dict),
    "roles": (dict, str),
    "samples": (list, dict),
}


def read_report(path: str | Path, kind: str = "evaluation") -> dict[str, Any]:
    """Read a report.

    Args:
        path (`str` or `Path`): The JSON file.
        kind (`str`, *optional*, defaults to `"evaluation"`): One of `KINDS`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for a file that holds another thing than a report, or a report of another schema or kind.
    """
    try:
        report = read_object(Path(path))
    except OSError as error:
        raise OSError(f"Report {path} cannot be read ({error}): check the path.") from error
    except ValueError as error:
        raise ValueError(f"Report {path} is {error}: name another file, or measure again.") from error
    check_report(report, kind, name=f"Report {path}")
    return report


def check_report(report: Mapping[str, Any], kind: str = "evaluation", *, name: str = "The report") -> None:
    """Raise `ValueError`, which calls the report `name`, unless it has this version's schema and form and is of a kind."""
    found = report.get("schema_version")
    if found != SCHEMA_VERSION:
        fix = "upgrade elm-trainer" if isinstance(found, int) and found > SCHEMA_VERSION else "measure again"
        raise ValueError(f"{name} has schema_version {found}, but this version reads {SCHEMA_VERSION}: {fix}.")
    if report.get("kind") != kind:
        raise ValueError(f"{name} is of the kind {report.get('kind')!r}, not {kind!r}: name another file.")
    for key, (form, parts) in _FORMS.items():
        value = report.get(key, form())
        entries = value.values() if isinstance(value, dict) else value
        if not isinstance(value, form) or parts and not all(isinstance(part, parts) for part in entries):
            raise ValueError(
                f"{name} has a `{key}` of another form than its own: name another file, or measure again."
            )


def environment(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Versions, seconds of each phase and peak memory of this process, as every report states them."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        # Linux counts kilobytes, macOS bytes.
        "peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def pair_fingerprint(pair: ModelPair) -> dict[str, str]:
    """`reference_sha256` of the reference's weights, and `erased_sha256` of the adapter or of the erased weights.

    Of weights in shards (FSDP, ZeRO-3) it is that of the whole ones; then all processes must call this.
    """
    with pair.use("reference") as reference:
        base = model_fingerprint(reference)
    adapter = pair.adapter
    if adapter is None:
        return {"reference_sha256": base, "erased_sha256": model_fingerprint(pair.erased)}
    own = [parameter for name, parameter in adapter.named_parameters() if "lora_" in name]
    with gather_params_ctx(own, modifier_rank=None):
        return {"reference_sha256": base, "erased_sha256": adapter_fingerprint(get_peft_model_state_dict(adapter))}


def dataset_info(texts: Sequence[str], revision: str | None = None) -> dict[str, Any]:
    """Revision, size and SHA-256 of a list of texts."""
    digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
    return {"revision": revision, "size": len(texts), "sha256": digest}


def bank_info(questions: Sequence[Question], revision: str | None = None) -> dict[str, Any]:
    """The same of a question bank."""
    return dataset_info([json.dumps(asdict(question), ensure_ascii=False) for question in questions], revision)


def suite_info(suite: EvaluationSuite) -> dict[str, dict[str, Any]]:
    """The same of everything that a suite asks, by name."""
    found = {f"bank {name}": bank_info(bank, suite.revision) for name, bank in suite.banks.items()}
    for what, asked in (("open questions", suite.open_questions), ("cloze", suite.cloze)):
        for name, questions in asked.items():
            found[f"{what} {name}"] = dataset_info([json.dumps(asdict(q)) for q in questions], suite.revision)
    for one in suite.benchmarks:
        probes = [json.dumps([*one.examples, asdict(probe)]) for probe in one.probes]
        found[f"benchmark {one.name}"] = dataset_info(probes, one.revision)
    for name, ratios in suite.retained.items():
        found[f"benchmark {name}, model without it"] = dataset_info([repr(ratio) for ratio in ratios])
    texts = {"retain": suite.retain_texts, "forget": suite.forget_texts, "concept prompts": suite.concept_prompts}
    return found | {f"texts {name}": dataset_info(value, suite.revision) for name, value in texts.items()}


def harness_results(
    asked: Mapping[str, Mapping[str, Any]], items: Mapping[str, Mapping[str, Items]]
) -> dict[str, dict[str, Any]]:
    """What tasks of lm-evaluation-harness found, with what identifies them.

    Of each task that is what [`HarnessTasks.info`] says, the version of `lm_eval`, and by metric and side `value`, `stderr` and
    `n`. The standard error is that of a mean of independent documents, as the harness computes it for a task.
    """
    found = {}
    for task, info in asked.items():
        figures = {}
        for name, sides in items.items():
            if name.startswith(f"harness.{task}."):
                figures[name.removeprefix(f"harness.{task}.")] = {
                    side: {
                        "value": float(np.mean(one.values)),
                        "stderr": float(sem(one.values)) if len(one.values) > 1 else None,
                        "n": len(one.values),
                    }
                    for side, one in sides.items()
                }
        found[task] = {**info, "lm_eval": version("lm_eval"), "metrics": figures}
    return found


def retained_ratios(report: Mapping[str, Any], suite: EvaluationSuite) -> dict[str, list[float]]:
    """Logarithms of the truth ratios of a model that never saw TOFU's forget set, for `retained` of a suite.

    Args:
        report (`Mapping`): Evaluation report in which that model stands as the erased one, on the same set.
        suite ([`EvaluationSuite`]): What is asked.

    Raises:
        ValueError: if the suite asks no forget set of TOFU, or the report another one (in revision, size or content).
    """
    check_report(report, name="The report of the retain model")
    found = {}
    for name, info in suite_info(suite).items():
        title = name.removeprefix("benchmark ")
        if not name.startswith("benchmark tofu-forget") or name not in report.get("datasets", {}):
            continue
        if report["datasets"][name] != info:
            raise ValueError(
                f"The report of the retain model asks another {title!r}: it is {report['datasets'][name]} there, and {info} "
                "here. Measure both on the same files, with the same limit."
            )
        sides = report.get("items", {}).get(f"benchmarks.{title}.log_truth_ratio")
        if sides is not None:
            found[title] = list(sides["erased"]["values"])
    if not found:
        asked = [one.name for one in suite.benchmarks if one.role == "erased"]
        raise ValueError(
            f"The report of the retain model has no truth ratios of what is asked, {asked}: measure that model with the same "
            "`benchmark`, such as tofu:forget10."
        )
    return found


def compare_reports(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How the erased model of the second report differs from that of the first, on the same items.

    Args:
        first (`Mapping`): An evaluation report.
        second (`Mapping`): Another one on the same reference and the same questions.

    Returns:
        `dict`: by name of the metric: `first`, `second`, `change` and `p` (corrected by Holm's method), as in
        [`evaluate_erasure`].

    Raises:
        TypeError: if one is something else than a report, such as a path.
        ValueError: if one is a report of another kind or schema, the references differ, or what was asked differs in
            name, revision, size or content.
    """
    for name, report in (("first", first), ("second", second)):
        if not isinstance(report, Mapping):
            raise TypeError(
                f"`{name}` is of type {type(report).__name__}: give a report, such as `read_report(path)`."
            )
        check_report(report, name=f"`{name}`")
        if missing := sorted({"reference_sha256", "datasets", "figures", "items"} - report.keys()):
            raise ValueError(f"`{name}` is a report without `{missing[0]}`: measure again.")
    if first["reference_sha256"] != second["reference_sha256"]:
        raise ValueError(
            f"The reports have different reference models (`reference_sha256` {first['reference_sha256'][:12]} and "
            f"{second['reference_sha256'][:12]}): compare erasures of the same model."
        )
    one, other = first["datasets"], second["datasets"]
    # The training data are there too, and may differ.
    asked = {name for name in one.keys() | other.keys() if name.partition(" ")[0] in _ASKED}
    if different := sorted(name for name in asked if one.get(name) != other.get(name)):
        name = different[0]
        raise ValueError(
            f"The reports ask different things ({', '.join(different)}): {name!r} is {one.get(name)} in the first "
            f"and {other.get(name)} in the second. Measure both with the same version, revision and suite."
        )
    compared: dict[str, dict[str, Any]] = {}
    for name in first["figures"]:
        # Those of all ways of asking together are made of the others' items.
        if name in second["figures"] and name in first["items"]:
            try:
                statistic = first["figures"][name]["statistic"]
                sides = [Items(statistic, **report["items"][name]["erased"]) for report in (first, second)]
                compared[name] = {"first": sides[0].estimate().to_dict(), "second": sides[1].estimate().to_dict()}
                compared[name] |= change(*sides)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
                raise ValueError(
                    f"What the reports say of {name!r} cannot be compared ({error!r}): measure again."
                ) from error
    correct_p(compared)
    return compared
