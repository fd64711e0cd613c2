"""`publish_adapter`: an erased adapter with its evidence, and `publish_dataset`: synthetic pairs, each in one commit with its card."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.utils import validate_repo_id, yaml_dump
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.facts import BANKS, load_bank
from ..data.questions import Question
from ..data.sources import load_texts
from ..evaluation.report import read_report
from ..files import write_rows
from ..fingerprint import model_fingerprint
from ..synthesis import SynthesisConfig, SynthesisResult
from .card import CONCEPT_TAG, TAG, TASK, check_commit, check_id, keep_written, make_card, record, validate_card
from .card_text import PICTURES
from .commit import Publication, lap, send_folder, with_namespace
from .errors import BaseMismatchError
from .info import CARD, PUBLISHED_FILES, BaseModel, make_probes
from .persons import machine_names, names_in
from .published_report import find_public_sources, mask_samples, published_report
from .scan import check_allowed, raise_findings, scan_folder, without_template
from .stage import check_hub_base, check_reload, erased_model, find_base, method_of, stage_adapter
from .untrusted import code, fenced, inline, plain, table


# Of a data set and its card.
PAIRS = "pairs.jsonl"
DATASET_TEMPLATE = Path(__file__).with_name("templates") / "dataset_card.md"
DATASET_TAGS = (TAG, "unlearning", "concept-erasure", "synthetic")
DATASET_REPLACED = (
    "language_creators", "license", "pretty_name", "size_categories", "source_datasets", "task_categories"
)  # fmt: skip
_DROPPED = {"empty": "too short", "repetition": "repeated itself", "on_topic": "named a keyword"}


class _Settings:
    """Settings, of which some may stand among other keywords, and are taken out of there."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def pop_from(cls, keywords: dict[str, Any]) -> Self:
        return cls(**{name: keywords.pop(name) for name in cls.__dataclass_fields__ if name in keywords})

    def with_keywords(self, keywords: dict[str, Any]) -> Self:
        """These settings with the deprecated ones of `keywords`."""
        own = {name: keywords.pop(name) for name in vars(self) if name in keywords}
        if own:
            warnings.warn(
                f"{', '.join(f'`{name}`' for name in own)} as arguments of their own are deprecated, and go with the next "
                f"release: pass them as `{type(self).__name__}({', '.join(f'{name}=…' for name in own)})`.",
                DeprecationWarning,
                stacklevel=3,
            )
        return replace(self, **own)


@dataclass(frozen=True)
class CardDetails(_Settings):
    """What the card and `erasure.json` say of an adapter beside its report.

    Args:
        base_model (`str`, *optional*): Hub id of the base. Needed where the model was not loaded from the Hub.
        base_revision (`str`, *optional*): Commit or branch of the base; the newest commit by default.
        gguf_file (`str`, *optional*): File of the base's repository, where the base is a GGUF file.
        license (`str`, *optional*): License of the adapter. By default that of the base.
        method (`str`, *optional*): Name of the trainer. By default read from `erasure_run.json` beside the adapter.
    """

    base_model: str | None = None
    base_revision: str | None = None
    gguf_file: str | None = None
    license: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class PublishOptions(_Settings):
    """Where and how a folder is published.

    Args:
        private (`bool`, *optional*): Whether the repository must be private. `None`: a new one is private, an existing
            one stays as it is.
        revision (`str`, *optional*): Branch; `main` by default.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead of committing.
        tag (`str`, *optional*): Tag of the commit.
        commit_message (`str`, *optional*): First line of the commit's message.
        allow (`Mapping[str, str]`, *optional*): Reason why a finding of the scan may be published, by the finding's
            id. The reasons are logged, and those of an adapter go up in `erasure.json`.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to stop before anything is sent. The folder is left
            in `staging_dir`; neither the repository nor, with `license` and a commit as `base_revision`, the base's is
            looked at, nor are data sets asked for: each of the Hub reads `(private data set)` in it, public ones too.
        staging_dir (`str` or `Path`, *optional*): Where the folder is staged and kept; a temporary one by default.
            What a person wrote into a `README.md` in it goes up where the repository has none of its own.

    Raises:
        ValueError: for options that do not go together.
    """

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None
    commit_message: str | None = None
    allow: Mapping[str, str] | None = None
    dry_run: bool = False
    staging_dir: str | Path | None = None

    def __post_init__(self):
        if self.dry_run and self.staging_dir is None:
            raise ValueError("`staging_dir` is None: a dry run needs a folder to leave its files in.")
        if self.tag and self.create_pr:
            raise ValueError(
                f"`tag` is {self.tag!r}, but a pull request is not a commit of the branch yet: tag it when merged."
            )


def publish_adapter(
    adapter: str | Path,
    repo_id: str,
    *,
    report: str | Path | Mapping[str, Any],
    attacks: str | Path | Mapping[str, Any] | None = None,
    model: str | PreTrainedModel | PeftModel | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    forget: Sequence[str] | None = None,
    questions: Sequence[Question] | None = None,
    details: CardDetails | None = None,
    options: PublishOptions | None = None,
    api: HfApi | None = None,
    **keywords: Any,
) -> Publication:
    """Publish an adapter with its report and card, and with nothing else.

    The folder that goes up is staged, the adapter reloaded from it and held to the same logits, the base compared with
    the one on the Hub, the folder scanned for what must not get out; then it goes up in one commit. Nothing is
    committed where nothing changed. Local files are only read.

    Args:
        adapter (`str` or `Path`): Folder of the adapter, as `trainer.save_model` or `save_pretrained` wrote it.
        repo_id (`str`): `name` or `namespace/name`. The repository is made, private, where there is none.
        report (`str`, `Path` or `Mapping`): Report of [`evaluate_erasure`] on this adapter.
        attacks (`str`, `Path` or `Mapping`, *optional*): Report of [`attack_erasure`] on it.
        model (`str`, [`~transformers.PreTrainedModel`] or `PeftModel`, *optional*): The base, or the erased model
            itself. Loaded from the report's recipe by default.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): Tokenizer; needed where `model` is
            not a name.
        forget (`Sequence[str]`, *optional*): Forget texts, which must not go up. Read from the sources of the report's
            recipe by default.
        questions (`Sequence[Question]`, *optional*): Questions whose answers must not go up. By default the built-in
            ones of the erased concepts.
        details ([`CardDetails`], *optional*): Base, license and method, where the adapter and its report do not say.
        options ([`PublishOptions`], *optional*): Where and how the folder goes up.
        api (`HfApi`, *optional*): Client with endpoint and token. By default the environment's.
        keywords: Fields of `details` and `options` as arguments of their own, which is deprecated.

    Returns:
        [`Publication`]: commit, address, and the seconds of each step.

    Raises:
        TypeError: for an argument that there is not.
        ValueError: for a name, report, base, license, branch or tag that can't be, before anything is sent.
        UnsafeAdapterError: if the adapter, or what the repository holds already, is something that [`load_erased`] refuses.
        BaseMismatchError: if the Hub's base has other weights than the adapter's, or the report is of another base.
        ReloadError: if the staged adapter gives other logits.
        ScanError: if the folder holds what must not get out; `findings` names file, line and id. What a model wrote in
            the report's samples is masked instead, and logged.
        NotSignedInError, PermissionDeniedError, ConflictError, UploadError: what the Hub or the network refused.
    """
    validate_repo_id(repo_id)
    details = (details or CardDetails()).with_keywords(keywords)
    options = (options or PublishOptions()).with_keywords(keywords)
    if keywords:
        raise TypeError(f"`publish_adapter` has no argument `{next(iter(keywords))}`.")
    allow = options.allow or {}
    check_allowed(allow)
    api = api or HfApi()
    report = report if isinstance(report, Mapping) else read_report(report)
    if attacks is not None and not isinstance(attacks, Mapping):
        attacks = read_report(attacks, "attacks")
    texts = _forget_texts(report) if forget is None else forget
    asked = _questions(report) if questions is None else list(questions)
    if not options.dry_run:
        repo_id = with_namespace(api, repo_id)
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        with lap(seconds, "load"):
            erased, tokenizer = stack.enter_context(erased_model(adapter, report, model, processing_class))
        with lap(seconds, "check"):
            found = model_fingerprint(erased.get_base_model())
            if found != report["reference_sha256"]:
                raise BaseMismatchError(
                    f"The report measured a base with the hash {report['reference_sha256'][:12]}, but `model` has "
                    f"{found[:12]}: pass the model that was measured, in the same dtype, or measure again."
                )
            base = find_base(api, erased, details)
            texts = list(without_template(texts, tokenizer))
            names = machine_names(public=names_in(repo_id, base.id))
            report, whole = mask_samples(report, forget=texts, names=names)
            probes = make_probes(erased, tokenizer, {**report, "samples": whole})
            base_tokenizer = tokenizer
            if not options.dry_run:
                base_tokenizer, base = check_hub_base(erased, base, api.token)
        with lap(seconds, "stage"):
            published = published_report(
                report,
                base_model=base,
                method=details.method or method_of(Path(adapter)),
                attacks=attacks,
                questions=asked,
                public_sources=() if options.dry_run else find_public_sources(api, report),
            )
            folder = stage_adapter(
                adapter,
                published,
                output_dir=options.staging_dir or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter",
                verification=probes,
                base_tokenizer=base_tokenizer,
                allowed=allow,
            )
        with lap(seconds, "reload"):
            check_reload(erased, tokenizer, folder, probes)

        def write_card(current: str | None) -> None:
            pictures = [name for name in PICTURES if (folder / name).exists()]
            card = make_card(published, repo_id, pictures=pictures, current=current)
            validate_card(card)
            card.save(folder / CARD)
            raise_findings(scan_folder(folder, forget=texts, questions=asked, names=names), allow)

        owned, what = PUBLISHED_FILES, "the erased adapter"
        return send_folder(api, repo_id, folder, write_card, options, owned=owned, what=what, seconds=seconds)


def _forget_texts(report: Mapping[str, Any]) -> list[str]:
    sources = report.get("recipe", {}).get("forget")
    if not sources:
        raise ValueError(
            "`forget` is None, and the report's recipe names no forget source: pass the forget texts, which must not "
            "go up, or [] if nobody may not read them."
        )
    try:
        return [text for source in sources for text in load_texts(source, processing_class=None)["text"]]
    except Exception as error:
        raise ValueError(
            f"`forget` is None, and the recipe's sources {sources} can't be read ({error}): pass the forget texts."
        ) from error


def _questions(report: Mapping[str, Any]) -> list[Question]:
    asked = [bank for bank, role in report["roles"].items() if role == "erased"]
    erased = report.get("concepts") or asked
    # About a concept without a bank nothing was asked, and no answer can be given away. One that was made of documents has families alone.
    erased = [name for name in erased if name in BANKS or any(f"{bank}-".startswith(f"{name}-") for bank in asked)]
    if not set(erased) <= set(BANKS):
        raise ValueError(
            f"`questions` is None, and the banks {erased} are not built in: pass the questions, whose answers must not "
            "go up (`--bank` of examples/publish.py)."
        )
    # The whole banks in their plain form, whose answers are those of the facts: the report asked a draw of them.
    return [question for name in erased for question in load_bank(name)]


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

        repo_type, what = "dataset", "synthetic pairs"
        return send_folder(
            api, repo_id, folder, write_card, options, repo_type=repo_type, owned={PAIRS, CARD}, what=what, seconds={}
        )


def make_dataset_card(
    results: Mapping[str, SynthesisResult],
    config: SynthesisConfig,
    model: BaseModel,
    repo_id: str,
    *,
    current: str | None = None,
) -> DatasetCard:
    """Make the card of a data set of synthetic pairs, see [`publish_dataset`].

    What a person wrote into `current`, the repository's `README.md` as it is now, is kept as in [`make_card`].

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
        tags=[*DATASET_TAGS, *(CONCEPT_TAG + plain(concept) for concept in results)],
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
        template_path=str(DATASET_TEMPLATE),
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
    return keep_written(card, current, DATASET_REPLACED)


def _size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    limits = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = len(str(rows)) - 3
    if place < 1:
        return "n<1K"
    return f"{limits[place - 1]}<n<{limits[place]}" if place < len(limits) else "n>1T"
