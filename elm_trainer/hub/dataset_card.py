"""`make_dataset_card`: the card of synthetic pairs."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.utils import yaml_dump

from ..synthesis import SynthesisConfig, SynthesisResult
from .card import check_commit, check_id
from .generated import CONCEPT_TAG, TAG, keep_written, record
from .info import BaseModel
from .markdown import code, fenced, inline, plain, table
from .results import TASK


TEMPLATE = Path(__file__).with_name("templates") / "dataset_card.md"
TAGS = (TAG, "unlearning", "concept-erasure", "synthetic")
REPLACED = ("language_creators", "license", "pretty_name", "size_categories", "source_datasets", "task_categories")
_DROPPED = {"empty": "too short", "repetition": "repeated itself", "on_topic": "named a keyword"}


def make_dataset_card(
    results: Mapping[str, SynthesisResult],
    config: SynthesisConfig,
    model: BaseModel,
    repo_id: str,
    *,
    current: str | None = None,
) -> DatasetCard:
    """Make the card of a data set of synthetic pairs.

    What a person wrote is kept as in [`make_card`].

    Args:
        results (`Mapping[str, SynthesisResult]`): Pairs and counts of what was dropped, by name of the concept.
        config ([`SynthesisConfig`]): Settings that they were made with.
        model ([`BaseModel`]): The model that wrote them.
        repo_id (`str`): Repository of the data set, `name` or `owner/name`.
        current (`str`, *optional*): The repository's `README.md` as it is now.

    Raises:
        ValueError: if there are no pairs, an id or commit is none, or the current card cannot be read.
    """
    rows = sum(len(result.pairs) for result in results.values())
    if not rows:
        raise ValueError("`results` holds no pairs: synthesize some first.")
    check_id("repo_id", repo_id)
    check_id("model.id", model.id)
    check_commit(model.revision)
    concepts = ", ".join(map(inline, results))
    data = DatasetCardData(
        license=model.license,
        language_creators=["machine-generated"],
        size_categories=[_size_category(rows)],
        source_datasets=["original"],
        task_categories=[TASK],
        pretty_name=f"Pairs that turn away from {', '.join(map(plain, results))}",
        tags=[*TAGS, *(CONCEPT_TAG + plain(concept) for concept in results)],
    )
    reasons = list(dict.fromkeys([*_DROPPED, *(reason for result in results.values() for reason in result.dropped)]))
    counts = table(
        ("concept", "kept", *(f"dropped: {inline(_DROPPED.get(reason, reason))}" for reason in reasons)),
        (
            [inline(concept), str(len(result.pairs)), *(str(result.dropped.get(reason, 0)) for reason in reasons)]
            for concept, result in results.items()
        ),
    )
    card = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        record=record(data.to_dict()),
        concepts=concepts,
        rows=rows,
        model=f"[{inline(model.id)}](https://huggingface.co/{model.id})",
        commit=code(model.revision),
        counts=counts,
        settings=fenced(yaml_dump(asdict(config), sort_keys=False), "yaml"),
        use=_use(repo_id),
        license=code(model.license),
    )
    return keep_written(card, current, REPLACED)


def _size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    limits = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = max(len(str(rows)) - 3, 0)
    if place == 0:
        return "n<1K"
    return f"{limits[place - 1]}<n<{limits[place]}" if place < len(limits) else "n>1T"


def _use(repo_id: str) -> str:
    return fenced(
        "from elm_trainer import ConceptSources, build_erasure_dataset\n\n"
        f'sources = ConceptSources(forget="texts.jsonl", retain=["everyday"], synthetic="{repo_id}")\n'
        'dataset = build_erasure_dataset({"concept": sources})',
        "python",
    )
