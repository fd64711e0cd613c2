"""`make_card`: the model card of a published erasure, made from its report alone, with what a person wrote around it."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import RepoCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from ..data.user_sources import hub_id, is_hub_id
from ..evaluation.tables import NOT_MEASURED
from ..evaluation.verdict import CRITERIA, FAILS, UNCERTAIN, read_verdict, split_name
from .card_text import PICTURES, body
from .untrusted import plain, read_metadata


CardT = TypeVar("CardT", bound=RepoCard)
TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
START = "<!-- elm-trainer: generated, do not edit -->"
END = "<!-- elm-trainer: end -->"
TAG = "elm-trainer"
CONCEPT_TAG = "concept:"
TAGS = (TAG, "unlearning", "concept-erasure", "lora")
TASK = "text-generation"
# `type` of the data sets of generated results, by which they are told from results that a person added.
RESULTS = "elm-trainer"
# `config` of the data sets of the verdict and of the attacks; those of an evaluation are named as in the report.
VERDICT_CONFIG, ATTACKS_CONFIG = "criteria", "attacks"
# Generated, whatever stands there now; `licence` is what TRL writes in place of a license.
REPLACED = (
    "base_model", "base_model_relation", "library_name", "licence", "license", "model_name", "pipeline_tag",
)  # fmt: skip

_PART = re.compile(rf"^{re.escape(START)}[ \t]*$.*^{re.escape(END)}[ \t]*$", re.MULTILINE | re.DOTALL)
_RECORD = re.compile(r"^<!-- elm-trainer: metadata (\{.*\}) -->$", re.MULTILINE)
_LISTS = ("tags", "datasets")
# PEFT may write the path of the base model into such a tag; the Hub makes it itself.
_TAG_OF_THE_HUB = "base_model:"


def make_card(
    report: Mapping[str, Any], repo_id: str, *, pictures: Sequence[str] = (), current: str | None = None
) -> ModelCard:
    """Make the model card of an adapter.

    The generated part stands between two comments. What a person wrote outside them is kept, and so is metadata that
    a person added; a card without the comments is kept below the generated part, unless it is an untouched template of
    PEFT or TRL. The metadata hold every metric as an `EvalResult`.

    Args:
        pictures: Which of `report.png`, `attacks.png` and `inside.png` go up beside it.
        current: The repository's `README.md` as it is now.

    Raises:
        ValueError: for an unknown picture, an id or commit that cannot be, or a current card that cannot be read.
    """
    if unknown := [name for name in pictures if name not in PICTURES]:
        raise ValueError(f"`pictures` names {unknown}: a card shows {', '.join(PICTURES)}.")
    # The items, the bulk of a report, are not in a card. Halves of characters, which files in UTF-8 cannot hold, become "?".
    shown = json.dumps({key: part for key, part in report.items() if key != "items"}, ensure_ascii=False)
    report = json.loads(shown.encode("utf-8", "replace"))
    base, recipe = report["base_model"], report.get("recipe", {})
    check_id("repo_id", repo_id)
    check_id('report["base_model"]["id"]', base["id"])
    check_commit(base["revision"])
    sources = [source for key in ("forget", "retain", "synthetic") for source in recipe.get(key) or ()]
    data = ModelCardData(
        license=base["license"],
        library_name="peft",
        pipeline_tag=TASK,
        base_model=base["id"],
        base_model_relation="adapter",
        language=_language(report),
        datasets=list(dict.fromkeys(map(hub_id, filter(is_hub_id, sources)))) or None,
        tags=[*TAGS, *(CONCEPT_TAG + plain(concept) for concept in report["concepts"])],
        model_name=repo_id.split("/")[-1],
        eval_results=_results(report),
    )
    card = ModelCard.from_template(
        data, template_path=str(TEMPLATE), record=record(data.to_dict()), **body(report, repo_id, pictures)
    )
    return keep_written(card, current, REPLACED)


def validate_card(card: RepoCard) -> None:
    """Check without a network that the Hub will read a card as it was meant.

    Raises:
        ValueError: if the metadata change when they are read again, hold what JSON cannot, or lack a field, or if the
            generated part does not stand between its two comments.
    """
    content = str(card)
    again = type(card)(content)
    written, read = card.data.to_dict(), again.data.to_dict()
    if changed := sorted(key for key in {*written, *read} if written.get(key) != read.get(key)):
        raise ValueError(f"The card's metadata change when they are read again: {', '.join(changed)}.")
    if str(again) != content:
        raise ValueError("The card's text changes when it is read again.")
    try:
        # A date that a person wrote becomes text there.
        json.dumps(read, allow_nan=False, default=str)
    except ValueError as error:
        raise ValueError(f"The card's metadata cannot be turned into JSON, as the Hub does: {error}.") from error
    needed = ("license", "tags", *(("base_model", "model-index") if isinstance(card, ModelCard) else ()))
    if missing := [key for key in needed if not read.get(key)]:
        raise ValueError(f"The card's metadata lack {', '.join(missing)}.")
    if isinstance(card, ModelCard):
        _, results = model_index_to_eval_results(read["model-index"])
        if results != card.data.eval_results:
            raise ValueError("The card's results change when they are read again.")
    if [line for line in again.text.splitlines() if line in (START, END)] != [START, END]:
        raise ValueError(f"The card's text must have the lines {START!r} and {END!r}, each once and in this order.")


def check_id(what: str, name: str) -> None:
    """Raise `ValueError` where a name cannot be the id of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"`{what}` is {name!r}, which is not an id of the Hub ({error}): give `owner/name`."
        ) from error


def check_commit(revision: str) -> None:
    """Raise `ValueError` where a revision of a model is not a commit."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"The model's `revision` is {revision!r}: it must be a commit, of 40 hexadecimal digits.")


def _language(report: Mapping[str, Any]) -> str | None:
    """English where the built-in questions, which are English, asked for the concept; else it is left to a person."""
    banks = [report["datasets"].get(f"bank {bank}", {}) for bank, role in report["roles"].items() if role == "erased"]
    built_in = [str(info.get("revision") or "").startswith("elm-trainer ") for info in banks]
    return "en" if built_in and all(built_in) else None


def record(data: dict[str, Any]) -> str:
    """The entries of the metadata's lists as a comment, which tells them from a person's own."""
    lists = {key: data[key] for key in _LISTS if data.get(key)}
    # Nothing in it may end the comment.
    text = json.dumps(lists, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<!-- elm-trainer: metadata {text} -->"


def keep_written(card: CardT, current: str | None, replaced: Collection[str]) -> CardT:
    """The generated card with what a person wrote around it.

    Kept are the text outside the generated part, metadata under other keys, tags and data sets that were not generated,
    and results on other data sets. A card without a generated part is kept whole below it, unless it is an
    untouched template of PEFT or TRL. Line endings become `\\n`, and comments in the metadata are lost. `replaced` are keys of
    the metadata that are generated, whatever stands there now.

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
        found = _RECORD.search(old)
        recorded = json.loads(found[1]) if found else {}
        ours = {key: list(recorded[key]) for key in _LISTS if key in recorded}
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"The current README.md cannot be read ({' '.join(str(error).split())}): correct it, or delete it, then "
            "publish again."
        ) from error

    _, generated, _ = _parts(card.text)
    if old:
        card.text = before + generated + after
    else:
        theirs = "" if is_template(written.text) else written.text.strip()
        card.text = f"\n{generated}\n" + (f"\n{theirs}\n" if theirs else "")

    for key, value in written.data.to_dict().items():
        if key in _LISTS:
            entries = [str(entry) for entry in (value if isinstance(value, list) else [value])]
            added = [e for e in entries if e not in ours.get(key, ()) and not e.startswith(_TAG_OF_THE_HUB)]
            card.data[key] = list(dict.fromkeys([*(card.data.get(key) or ()), *added])) or None
        elif key == "model-index" and isinstance(card.data, ModelCardData) and isinstance(written.data, ModelCardData):
            results = [result for result in written.data.eval_results or () if result.dataset_type != RESULTS]
            card.data.eval_results = [*(card.data.eval_results or ()), *results]
        elif key not in replaced:
            card.data[key] = value
    return type(card)(str(card))


def is_template(text: str) -> bool:
    """Whether every line of a card's text is one that the templates of PEFT or TRL write."""
    lines = {line.strip() for line in re.sub(r"```bibtex\n.*?```", "", text, flags=re.DOTALL).splitlines()} - {""}
    known = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    known |= {"### Framework versions"}
    spec = find_spec("trl")
    folder = Path(spec.origin).parent / "templates" if spec and spec.origin else Path()
    theirs = {line.strip() for path in folder.glob("*_model_card.md") for line in path.read_text("utf-8").splitlines()}
    # Once without what stands under a condition, once with it.
    theirs |= {re.sub(r"\{% if .*?\{% endif %\}", "{{ condition }}", line) for line in theirs}
    filled = [re.split(r"\{\{.*?\}\}|\{%.*?%\}", line) for line in theirs]
    # A line that is one variable could be anything.
    patterns = [".*".join(map(re.escape, parts)) for parts in filled if "".join(parts).strip()]
    either = re.compile("|".join((r"- PEFT:? \S+", *patterns)))
    return bool(lines) and all(line in known or either.fullmatch(line) for line in lines)


def _parts(text: str) -> tuple[str, str, str]:
    """Text before the generated part, that part with its markers, and text after it."""
    starts, ends = (re.findall(rf"^{re.escape(mark)}[ \t]*$", text, re.MULTILINE) for mark in (START, END))
    if not starts and not ends:
        return text, "", ""
    part = _PART.search(text)
    if len(starts) != 1 or len(ends) != 1 or part is None:
        raise ValueError(
            f"the line {START!r} stands there {len(starts)} times and the line {END!r} {len(ends)} times, but each must "
            "stand there once and in this order, or not at all"
        )
    return text[: part.start()], part[0], text[part.end() :]


def _results(report: Mapping[str, Any]) -> list[EvalResult]:
    """The metrics of the evaluation and of the attacks, and the verdict, of a published report.

    Results on one data set stand together, as the model-index groups them. Its `dataset_config` is the name that the
    report gives to what was asked, and `dataset_args` hold its size, SHA-256 and, for a bank, its role. `metric_value`
    is the erased model's value, and `metric_args` hold the rest.
    """
    results = []
    for name, metric in report["figures"].items():
        config, bank, kind = _asked(name)
        role = bank if name.startswith("families.") else report["roles"].get(bank)
        more: dict[str, Any] = {}
        if "chance" in metric:  # of choices: what a guess gets, and the share of the margin over it that is left
            more = {"chance": finite(metric["chance"]), "counted": metric["left"] is not None}
            if metric["left"] is not None:
                more |= {"left": finite(metric["left"]["value"]), "left_interval": _interval(metric["left"])}
        info = report["datasets"].get(config, {}) | {"role": role}
        results.append(_measured(config, info, kind, name, metric, ("reference", "change"), more))
    if report["attacks"] is not None:
        info = report["attacks"]["datasets"]["questions"]
        for name, metric in report["attacks"]["figures"].items():
            more = {key: metric[key] for key in ("family", "metric", "brings_back")}
            results.append(
                _measured(ATTACKS_CONFIG, info, "accuracy", name, metric, ("reference", "unattacked"), more)
            )
    configs = list(dict.fromkeys(result.dataset_config for result in results))
    results.sort(key=lambda result: configs.index(result.dataset_config))
    verdict = read_verdict(report)
    bounds = {name: finite(bound) for name, bound in verdict["criteria"].items()}
    for name in CRITERIA:
        state, checks = verdict[name]["state"] or NOT_MEASURED, verdict[name]["checks"]
        args = {kind: [check["figure"] for check in checks if check["state"] == kind] for kind in (FAILS, UNCERTAIN)}
        results.append(_result(VERDICT_CONFIG, None, bounds, name, name, state, args))
    return results


def _measured(
    config: str,
    info: Mapping[str, Any],
    kind: str,
    name: str,
    metric: Mapping[str, Any],
    sides: Sequence[str],
    more: Mapping[str, Any],
) -> EvalResult:
    args: dict[str, Any] = {"n": metric["erased"]["n"], "interval": _interval(metric["erased"])}
    for side in sides:
        if (other := metric[side]) is not None:
            args |= {side: finite(other["value"]), f"{side}_interval": _interval(other)}
    if metric["p"] is not None:
        args["p"] = finite(metric["p"])
    asked = {key: info[key] for key in ("size", "sha256", "role") if info.get(key) is not None}
    return _result(
        config, info.get("revision"), asked or None, kind, name, finite(metric["erased"]["value"]), args | dict(more)
    )


def _result(
    config: str, revision: str | None, asked: Any, kind: str, name: str, value: Any, args: dict[str, Any]
) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=RESULTS,
        dataset_name=config,
        dataset_config=config,
        dataset_revision=revision,
        dataset_args=asked,
        metric_type=kind,
        metric_name=name,
        metric_value=value,
        metric_args=args,
    )


def _asked(name: str) -> tuple[str, str, str]:
    """What a metric was measured on, as the report's data sets name it, the bank it belongs to, and its usual name."""
    kind, bank, rule = split_name(name)
    first = rule.partition(".")[0]
    if kind == "multiple_choice":
        return f"bank {bank}", bank, "accuracy"
    if kind == "families":
        return f"all {bank} banks that the unmodified model knows", bank, "accuracy"
    if kind in ("open_answers", "cloze"):
        return f"{'open questions' if kind == 'open_answers' else kind} {bank}", bank, first or "accuracy"
    if kind in ("benchmarks", "harness"):
        return f"{'benchmark' if kind == 'benchmarks' else kind} {bank}", bank, rule
    usual = {"r_ppl": "perplexity", "kl": "kl_divergence"}
    if kind == "fluency":
        return "texts concept prompts", bank, usual.get(first, first)
    return "texts retain" if kind == "retention" else "texts concept prompts", bank, usual.get(bank, bank)


def finite(value: float) -> float | int | str:
    """A number as metadata can hold it: the Hub turns them into JSON, which knows no infinity."""
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else str(float(value))


def _interval(metric: Mapping[str, float]) -> list[float | int | str]:
    return [finite(metric["low"]), finite(metric["high"])]
