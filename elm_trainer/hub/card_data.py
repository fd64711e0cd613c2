"""The generated part and the metadata of a model card: where it begins and ends, and each metric as a model-index result."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import RepoCard

from ..evaluation.tables import NOT_MEASURED
from ..evaluation.verdict import CRITERIA, FAILS, UNCERTAIN, read_verdict
from .untrusted import read_metadata


CardT = TypeVar("CardT", bound=RepoCard)
START = "<!-- elm-trainer: generated, do not edit -->"
END = "<!-- elm-trainer: end -->"
TAG = "elm-trainer"
CONCEPT_TAG = "concept:"
# `type` of the data sets of generated results, by which they are told from results that a person added.
RESULTS = "elm-trainer"

_START = re.compile(rf"^{re.escape(START)}[ \t]*$", re.MULTILINE)
_END = re.compile(rf"^{re.escape(END)}[ \t]*$", re.MULTILINE)
_RECORD = re.compile(r"^<!-- elm-trainer: metadata (\{.*\}) -->$", re.MULTILINE)
_LISTS = ("tags", "datasets")
# PEFT may write the path of the base model into such a tag; the Hub makes it itself.
_TAG_OF_THE_HUB = "base_model:"


def record(data: dict[str, Any]) -> str:
    """The entries of the metadata's lists as a comment, so that they can be told from a person's own."""
    lists = {key: data[key] for key in _LISTS if data.get(key)}
    # Nothing in it may end the comment.
    text = json.dumps(lists, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<!-- elm-trainer: metadata {text} -->"


def keep_written(card: CardT, current: str | None, replaced: Collection[str]) -> CardT:
    """The generated card with what a person wrote around it.

    Kept are the text outside the generated part, metadata under other keys, tags and data sets that were not generated,
    and results on other data sets. A card without a generated part is kept whole below it, unless it is an
    untouched template of PEFT or TRL. Line endings become `\\n`, and comments in the metadata are lost.

    Args:
        card (`RepoCard`): Card that was just generated.
        current (`str` or `None`): `README.md` as it is now.
        replaced (`Collection[str]`): Keys of the metadata that are generated, whatever stands there now.

    Raises:
        ValueError: if `current` cannot be read, or has one of the two markers without the other or twice.
    """
    if current is None or not current.strip():
        return card
    current = re.sub(r"\r\n?", "\n", current.removeprefix("\ufeff"))
    try:
        read_metadata(current)  # whoever may write to the repository may have written them
        written = type(card)(current)
        before, old, after = _parts(written.text)
        ours = _recorded(old)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"The current README.md cannot be read ({' '.join(str(error).split())}): correct it, or delete it, then "
            "publish again."
        ) from error

    _, generated, _ = _parts(card.text)
    if old:
        card.text = before + generated + after
    elif is_template(written.text):
        card.text = f"\n{generated}\n"
    else:
        card.text = f"\n{generated}\n" + (f"\n{text}\n" if (text := written.text.strip()) else "")

    for key, value in written.data.to_dict().items():
        if key in _LISTS:
            entries = [str(entry) for entry in (value if isinstance(value, list) else [value])]
            theirs = [e for e in entries if e not in ours.get(key, ()) and not e.startswith(_TAG_OF_THE_HUB)]
            merged = list(dict.fromkeys([*(card.data.get(key) or ()), *theirs]))
            card.data[key] = merged or None
        elif key == "model-index" and isinstance(card.data, ModelCardData) and isinstance(written.data, ModelCardData):
            results = [result for result in written.data.eval_results or () if result.dataset_type != RESULTS]
            card.data.eval_results = [*(card.data.eval_results or ()), *results]
        elif key not in replaced:
            card.data[key] = value
    return type(card)(str(card))


def is_template(text: str) -> bool:
    """Whether every line of a card's text is one that the templates of PEFT or TRL write."""
    lines = {line.strip() for line in re.sub(r"```bibtex\n.*?```", "", text, flags=re.DOTALL).splitlines()} - {""}
    if not lines:
        return False
    known = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    known |= {"### Framework versions"}
    patterns = [re.compile(r"- PEFT:? \S+"), *_trl_lines()]
    return all(line in known or any(pattern.fullmatch(line) for pattern in patterns) for line in lines)


def _trl_lines() -> list[re.Pattern[str]]:
    """What each line of TRL's card templates can be filled in to."""
    spec = find_spec("trl")
    folder = Path(spec.origin).parent / "templates" if spec and spec.origin else Path()
    lines = {line.strip() for path in folder.glob("*_model_card.md") for line in path.read_text("utf-8").splitlines()}
    # Once without what stands under a condition, once with it.
    lines |= {re.sub(r"\{% if .*?\{% endif %\}", "{{ condition }}", line) for line in lines}
    filled = [re.split(r"\{\{.*?\}\}|\{%.*?%\}", line) for line in lines]
    # A line that is one variable could be anything.
    return [re.compile(".*".join(map(re.escape, parts))) for parts in filled if "".join(parts).strip()]


def _recorded(old: str) -> dict[str, list[str]]:
    """The lists that [`record`] wrote into the generated part."""
    found = _RECORD.search(old)
    lists = json.loads(found[1]) if found else {}
    return {key: list(lists[key]) for key in _LISTS if key in lists}


def _parts(text: str) -> tuple[str, str, str]:
    """Text before the generated part, that part with its markers, and text after it."""
    starts, ends = list(_START.finditer(text)), list(_END.finditer(text))
    if not starts and not ends:
        return text, "", ""
    if len(starts) != 1 or len(ends) != 1 or starts[0].end() > ends[0].start():
        raise ValueError(
            f"the line {START!r} stands there {len(starts)} times and the line {END!r} {len(ends)} times, but each must "
            "stand there once and in this order, or not at all"
        )
    start, end = starts[0].start(), ends[0].end()
    return text[:start], text[start:end], text[end:]


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
        config, bank = _asked_results(name)
        info = report["datasets"].get(config, {})
        role = bank if name.startswith("families.") else report["roles"].get(bank)
        args = {"size": info.get("size"), "sha256": info.get("sha256"), "role": role}
        others = {side: figure[side] for side in ("reference", "change")}
        result = _result(config, info.get("revision"), args, _metric(name), name, figure, others, _left_result(figure))
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
    by_config[VERDICT_CONFIG] = [_verdict_results(name, verdict[name], bounds) for name in CRITERIA]
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


def _verdict_results(name: str, found: Mapping[str, Any], bounds: Mapping[str, Any]) -> EvalResult:
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


def _left_result(figure: Mapping[str, Any]) -> dict[str, Any]:
    """Of choices: the probability of a guess, and the share of the margin over it that is left, where that counts."""
    if "chance" not in figure:
        return {}
    found: dict[str, Any] = {"chance": finite(figure["chance"]), "counted": figure["left"] is not None}
    if figure["left"] is not None:
        found |= {"left": finite(figure["left"]["value"]), "left_interval": _interval(figure["left"])}
    return found


def _asked_results(name: str) -> tuple[str, str]:
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
