"""`make_card`: the model card of a published erasure, made from its report alone."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import RepoCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from ..data.user_sources import is_hub_id
from .card_data import CONCEPT_TAG, END, START, TAG, TASK, keep_written, record, report_results
from .card_text import PICTURES, body
from .untrusted import plain


TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
TAGS = (TAG, "unlearning", "concept-erasure", "lora")
# Generated, whatever stands there now; `licence` is what TRL writes in place of a licence.
REPLACED = (
    "base_model",
    "base_model_relation",
    "library_name",
    "licence",
    "license",
    "model_name",
    "pipeline_tag",
)


def make_card(
    report: Mapping[str, Any], repo_id: str, *, pictures: Sequence[str] = (), current: str | None = None
) -> ModelCard:
    """Make the model card of an adapter.

    The generated part stands between two comments. What a person wrote outside them is kept, and so is metadata that
    a person added; a card without the comments is kept below the generated part, unless it is an untouched template of
    PEFT or TRL.

    Args:
        report (`Mapping`): The published report.
        repo_id (`str`): Repository of the adapter, `name` or `owner/name`.
        pictures (`Sequence[str]`, *optional*): Which of `report.png`, `attacks.png` and `inside.png` go up beside it.
        current (`str`, *optional*): The repository's `README.md` as it is now.

    Returns:
        `ModelCard`: the card; its metadata hold every figure as an `EvalResult`.

    Raises:
        ValueError: for an unknown picture, an id or commit that is none, or a current card that cannot be read.
    """
    if unknown := [name for name in pictures if name not in PICTURES]:
        raise ValueError(f"`pictures` names {unknown}: a card shows {', '.join(PICTURES)}.")
    # The items, the bulk of a report, are not in a card. Halves of characters, which files in UTF-8 cannot hold, become "?".
    shown = json.dumps({key: part for key, part in report.items() if key != "items"}, ensure_ascii=False)
    report = json.loads(shown.encode("utf-8", "replace"))
    base = report["base_model"]
    check_id("repo_id", repo_id)
    check_id('report["base_model"]["id"]', base["id"])
    check_commit(base["revision"])
    data = ModelCardData(
        license=base["license"],
        library_name="peft",
        pipeline_tag=TASK,
        base_model=base["id"],
        base_model_relation="adapter",
        language=_language(report),
        datasets=_datasets(report) or None,
        tags=[*TAGS, *(CONCEPT_TAG + plain(concept) for concept in report["concepts"])],
        model_name=repo_id.split("/")[-1],
        eval_results=report_results(report),
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
    lines = again.text.splitlines()
    if [line for line in lines if line in (START, END)] != [START, END]:
        raise ValueError(f"The card's text must have the lines {START!r} and {END!r}, each once and in this order.")


def check_id(what: str, name: str) -> None:
    """Raise `ValueError` where a name is no id of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"`{what}` is {name!r}, which is no id of the Hub ({error}): give `owner/name`.") from error


def check_commit(revision: str) -> None:
    """Raise `ValueError` where a revision of a model is no commit."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"The model's `revision` is {revision!r}: it must be a commit, of 40 hexadecimal digits.")


def _language(report: Mapping[str, Any]) -> str | None:
    """English where the built-in questions, which are English, asked for the concept; else it is left to a person."""
    banks = [report["datasets"].get(f"bank {bank}", {}) for bank, role in report["roles"].items() if role == "erased"]
    built_in = [str(info.get("revision") or "").startswith("elm-trainer ") for info in banks]
    return "en" if built_in and all(built_in) else None


def _datasets(report: Mapping[str, Any]) -> list[str]:
    """The sources of the recipe that are data sets on the Hub, and not built in or files."""
    recipe = report.get("recipe", {})
    sources = [source for key in ("forget", "retain", "synthetic") for source in recipe.get(key) or ()]
    return list(dict.fromkeys(source for source in sources if is_hub_id(source)))
