"""The local reports as they are published: nothing of the machine, no right answers, nothing unsafe in samples."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers.utils import logging

from ..data.questions import Question
from ..evaluation.report import check_report
from .info import BaseModel
from .passages import MASK, Document, find_passages, mask_answers
from .published_recipe import LOCAL_FILE, published_recipe
from .scan import find_private
from .secrets import readings


logger = logging.get_logger(__name__)
_WRITTEN = ("prompt", "reference", "erased")


def mask_samples(
    report: Mapping[str, Any], *, forget: Iterable[str] = (), names: Collection[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report with secrets, paths, persons and forget passages in its samples masked by `▇▇▇`; each is logged.

    Args:
        report (`Mapping`): Local report; it stays as it is.
        forget (`Iterable[str]`, *optional*): Forget texts. A side of a sample that holds a passage is masked as a whole.
        names (`Collection[str]`, *optional*): Names of persons and machines.

    Returns:
        The report, and those of its samples in which nothing was masked.
    """
    samples = [dict(sample) for sample in report["samples"]]
    texts = {
        (number, side): Document(f"samples[{number}].{side}", sample[side])
        for number, sample in enumerate(samples)
        for side in _WRITTEN
        if isinstance(sample.get(side), str)
    }
    passages = {passage.document.file for passage in find_passages(list(texts.values()), forget)}
    for (number, side), document in texts.items():
        if document.file in passages:
            masked, kinds = MASK, ["words in a row of a forget text"]
        else:
            masked, kinds = mask_private(document.text, names)
        if kinds:
            samples[number][side] = masked
            logger.warning(f"{document.file} of the report holds {', '.join(kinds)}, which the model wrote: masked.")
    whole = [new for new, old in zip(samples, report["samples"], strict=True) if new == old]
    return {**report, "samples": samples}, whole


def mask_private(text: str, names: Collection[str] = ()) -> tuple[str, list[str]]:
    """The text with what gives away a secret, a person or a machine masked, and the kinds of what was found."""
    hits = list(find_private(text, names))
    kinds = {hit.kind for hit in hits}
    masked, end = "", 0
    for hit in sorted(hits):
        masked += text[end : hit.start] + MASK * (hit.start >= end and hit.end > end)
        end = max(end, hit.end)
    masked += text[end:]
    # What shows only when escapes are resolved has no place of its own in the text: its lines go as a whole.
    for reading in readings(masked)[1:]:
        for hit in find_private(reading, names):
            kinds.add(hit.kind)
            first, last = reading.count("\n", 0, hit.start), reading.count("\n", 0, hit.end)
            lines = masked.split("\n")
            masked = "\n".join(MASK if first <= number <= last else line for number, line in enumerate(lines))
    return masked, sorted(kinds)


_SHARED = (
    "schema_version", "kind", "figures", "reference_sha256", "erased_sha256", "datasets", "versions", "seconds",
    "peak_memory_bytes", "peak_device_memory_bytes",
)  # fmt: skip
_EVALUATION = (
    *_SHARED, "verdict", "flags", "roles", "shortcuts", "items", "samples", "inside", "settings", "training_log",
)  # fmt: skip
_ATTACKS = (*_SHARED, "chance", "worst_case", "families", "curves", "attacks", "skipped")

_PATH = re.compile(
    r"(\.{1,2})?/|~|\\\\|file:|[A-Za-z]:[/\\]"
    r"|.*\.(jsonl?|txt|csv|tsv|parquet|ya?ml|gguf|bin|pt|pth|safetensors|jinja|py)$",
    re.IGNORECASE,
)


def published_report(
    report: Mapping[str, Any],
    *,
    base_model: BaseModel,
    method: str,
    attacks: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    questions: Sequence[Question] = (),
) -> dict[str, Any]:
    """Turn the local reports into the one that is published.

    Only known keys go up, and of the recipe only known settings, each of its own type (see [`published_recipe`]). A source
    that is a file here reads `(local file)`: the SHA-256 of its texts stands in `datasets`. Samples lose the right answer,
    and where a model gives it about what was erased, it is masked with `▇▇▇`.

    Args:
        report (`Mapping`): The evaluation report.
        base_model ([`BaseModel`]): What the adapter belongs to.
        method (`str`): Trainer that made the adapter, such as `"ElmTrainer"`.
        attacks (`Mapping`, *optional*): The attack report on the same models.
        recipe (`Mapping`, *optional*): Settings of the training. The report's own `recipe` by default.
        questions (`Sequence[Question]`, *optional*): Questions whose aliases of a right answer are masked too.

    Returns:
        `dict`: an evaluation report with the further keys `concepts` (`list[str]`), `method`, `base_model` (a `dict` of
        [`BaseModel`]), `recipe` and `attacks` (`None`, or the attack report).

    Raises:
        ValueError: for reports of another kind or schema, an attack report on other models, a report in which nothing
            was erased, or a recipe without a seed.
    """
    check_report(report)
    concepts = [bank for bank, role in report["roles"].items() if role == "erased"]
    # Earlier versions named no concepts, and had one bank for each.
    concepts = list(report.get("concepts", concepts)) if concepts else []
    recipe = report.get("recipe", {}) if recipe is None else recipe
    concepts = concepts or list(recipe.get("concepts") or ())
    if not concepts:
        raise ValueError(
            f"`report` names nothing that was erased (`roles` is {dict(report['roles'])}): measure the erased model on "
            "a suite with a bank of the role 'erased'."
        )
    if "seed" not in recipe:
        raise ValueError(
            f"`recipe` has no `seed` (it has {sorted(recipe)}), so nobody could repeat the training: pass its settings "
            "as `recipe`, or to `evaluate_erasure` as `details={'recipe': ...}`."
        )
    if attacks is not None:
        check_report(attacks, "attacks", name="The attack report")
        for key in ("reference_sha256", "erased_sha256"):
            if attacks[key] != report[key]:
                raise ValueError(
                    f"`attacks` are on another model than `report`: `{key}` is {attacks[key][:12]} there and "
                    f"{report[key][:12]} in the report. Attack and measure the same adapter."
                )
    published = {key: report[key] for key in _EVALUATION if key in report}
    published["items"] = {
        name: {side: {key: found[key] for key in ("values", "counts")} for side, found in sides.items()}
        for name, sides in report["items"].items()
    }
    aliases = {question.answer: question.aliases for question in questions}
    published["samples"] = [_masked(sample, aliases.get(sample["answer"], ())) for sample in report["samples"]]
    published["training_log"] = [_numbers(row) for row in report.get("training_log") or []]
    for key in ("settings", "datasets"):
        published[key] = _without_paths(published[key])
    return published | {
        "concepts": concepts,
        "method": method,
        "base_model": asdict(base_model),
        "recipe": published_recipe(recipe, base_model, concepts),
        "attacks": None if attacks is None else _public_attacks(attacks),
    }


def _masked(sample: Mapping[str, str], aliases: Sequence[str]) -> dict[str, str]:
    # What is to be kept may be told.
    answers = [sample["answer"], *aliases] if sample.get("role", "erased") == "erased" else []
    said = {side: mask_answers(sample[side], answers) for side in ("reference", "erased")}
    return {key: sample[key] for key in ("role", "prompt") if key in sample} | said


def _public_attacks(attacks: Mapping[str, Any]) -> dict[str, Any]:
    public = {key: attacks[key] for key in _ATTACKS if key in attacks}
    public["datasets"] = _without_paths(public["datasets"])
    public["attacks"] = [
        {"name": row["name"], "settings": _without_paths(row["settings"]), "seconds": row["seconds"]}
        # An attack's own words, such as a suffix that it found, may hold what was erased; its numbers cannot.
        | {"details": {figure: _numbers(details) for figure, details in row["details"].items()}}
        for row in attacks["attacks"]
    ]
    public["skipped"] = _without_paths(public["skipped"])
    return public


def _numbers(details: Mapping[str, Any]) -> dict[str, int | float]:
    return {key: value for key, value in details.items() if isinstance(value, (int, float))}


def _without_paths(value: Any) -> Any:
    """The value with every string that is a path on this machine replaced."""
    if isinstance(value, Mapping):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(part) for part in value]
    return LOCAL_FILE if isinstance(value, str) and _PATH.match(value) else value
