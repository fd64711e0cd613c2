"""`publish_dataset`: synthetic pairs with their card, in one commit."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.utils import validate_repo_id, yaml_dump

from ..files import write_rows
from ..synthesis import SynthesisConfig, SynthesisResult
from .card import CONCEPT_TAG, TAG, TASK, check_commit, check_id, keep_written, record
from .commit import Publication, with_namespace
from .info import CARD, BaseModel
from .persons import machine_names, names_in
from .publish import PublishOptions, send_folder
from .scan import raise_findings, scan_folder
from .untrusted import code, fenced, inline, plain, table


PAIRS = "pairs.jsonl"
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
        results: Pairs and counts of what was dropped, by name of the concept.
        config: Settings that they were made with.
        model: The model that wrote them.
        repo_id: Repository of the data set, `name` or `owner/name`.
        current: The repository's `README.md` as it is now.

    Raises:
        ValueError: if there are no pairs, an id or commit cannot be, or the current card cannot be read.
    """
    rows = sum(len(result.pairs) for result in results.values())
    if not rows:
        raise ValueError("`results` holds no pairs: synthesize some first.")
    check_id("repo_id", repo_id)
    check_id("model.id", model.id)
    check_commit(model.revision)
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
        concepts=", ".join(map(inline, results)),
        rows=rows,
        model=f"[{inline(model.id)}](https://huggingface.co/{model.id})",
        commit=code(model.revision),
        counts=counts,
        settings=fenced(yaml_dump(asdict(config), sort_keys=False), "yaml"),
        use=fenced(
            "from elm_trainer import ConceptSources, build_erasure_dataset\n\n"
            f'sources = ConceptSources(forget="texts.jsonl", retain=["everyday"], synthetic="{repo_id}")\n'
            'dataset = build_erasure_dataset({"concept": sources})',
            "python",
        ),
        license=code(model.license),
    )
    return keep_written(card, current, REPLACED)


def _size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    limits = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = len(str(rows)) - 3
    if place < 1:
        return "n<1K"
    return f"{limits[place - 1]}<n<{limits[place]}" if place < len(limits) else "n>1T"


def publish_dataset(
    results: Mapping[str, SynthesisResult],
    repo_id: str,
    *,
    config: SynthesisConfig,
    model: BaseModel,
    forget: Sequence[str] = (),
    options: PublishOptions | None = None,
    api: HfApi | None = None,
    **keywords: Any,
) -> Publication:
    """Publish the synthetic pairs of one or more concepts as a dataset.

    The rows go up as `pairs.jsonl` with the columns `concept`, `prompt` and `completion`, which
    [`build_erasure_dataset`] reads by the repository's id.

    Args:
        results (`Mapping[str, SynthesisResult]`): What [`synthesize_completions`] gave, by name of the concept.
        repo_id (`str`): `name` or `namespace/name`.
        config ([`SynthesisConfig`]): Settings that the pairs were made with.
        model ([`BaseModel`]): The model that wrote them; the data set inherits its license.
        forget (`Sequence[str]`, *optional*): Forget texts, whose passages must not go up.
        options ([`PublishOptions`], *optional*): Where and how the data set goes up.
        api (`HfApi`, *optional*): Client with endpoint and token. By default the environment's.
        keywords: Fields of `options` as arguments of their own, which is deprecated.

    Raises:
        ValueError: if there are no pairs, or a name, branch or tag can't be.
        ScanError: if the pairs or the card hold what must not get out.
        NotSignedInError, PermissionDeniedError, ConflictError, UploadError: what the Hub or the network refused.
    """
    validate_repo_id(repo_id)
    options = (options or PublishOptions()).with_keywords(keywords)
    if keywords:
        raise TypeError(f"`publish_dataset` has no argument `{next(iter(keywords))}`.")
    api = api or HfApi()
    if not options.dry_run:
        repo_id = with_namespace(api, repo_id)
    names = machine_names(public=names_in(repo_id, model.id))
    with ExitStack() as stack:
        folder = Path(options.staging_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"concept": concept, "prompt": prompt, "completion": completion}
            for concept, result in results.items()
            for prompt, completion in result.pairs
        ]
        write_rows(folder / PAIRS, rows)

        def write_card(current: str | None) -> None:
            make_dataset_card(results, config, model, repo_id, current=current).save(folder / CARD)
            raise_findings(scan_folder(folder, forget=forget, names=names, allowed={PAIRS, CARD}), options.allow)

        owned = {PAIRS, CARD}
        return send_folder(
            api, repo_id, folder, write_card, options, repo_type="dataset", owned=owned, what="synthetic pairs"
        )
