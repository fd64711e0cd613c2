"""`publish_adapter`: an erased adapter with its evidence, in one commit."""

import re
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.facts import BANKS, load_bank
from ..data.questions import Question
from ..data.sources import load_texts
from ..data.user_sources import hub_id
from ..evaluation.report import read_report
from ..fingerprint import base_fingerprint, model_fingerprint
from ..modeling import load_model_and_tokenizer
from .card import make_card, validate_card
from .card_text import PICTURES
from .commit import Publication, commit_folder, open_repository, read_text, url_of, with_namespace
from .errors import BaseMismatchError, HubError, bounded_waits, named_errors, retried
from .info import CARD, PUBLISHED_FILES, BaseModel, check_base, make_probes
from .persons import machine_names, names_in
from .published_report import hub_sources, mask_samples
from .safety import check_names
from .scan import check_allowed, raise_findings, scan_folder, without_template
from .stage import check_reload, stage_adapter


logger = logging.get_logger(__name__)


class _Group:
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
class CardDetails(_Group):
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
class PublishOptions(_Group):
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
    allow, staging_dir = options.allow or {}, options.staging_dir
    check_allowed(allow)
    api = api or HfApi()
    report = report if isinstance(report, Mapping) else read_report(report)
    if attacks is not None and not isinstance(attacks, Mapping):
        attacks = read_report(attacks, "attacks")
    texts = _forget_texts(report) if forget is None else list(forget)
    asked = _questions(report) if questions is None else list(questions)
    if not options.dry_run:
        repo_id = with_namespace(api, repo_id)
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        with _lap(seconds, "load"):
            erased, tokenizer = stack.enter_context(_erased_model(adapter, report, model, processing_class))
        with _lap(seconds, "check"):
            found = model_fingerprint(erased.get_base_model())
            if found != report["reference_sha256"]:
                raise BaseMismatchError(
                    f"The report measured a base with the hash {report['reference_sha256'][:12]}, but `model` has "
                    f"{found[:12]}: pass the model that was measured, in the same dtype, or measure again."
                )
            base = _find_base(api, erased, details)
            forget_texts = list(without_template(texts, tokenizer))
            names = machine_names(public=names_in(repo_id, base.id))
            report, whole = mask_samples(report, forget=forget_texts, names=names)
            probes = make_probes(erased, tokenizer, {**report, "samples": whole})
            hub_tokenizer = tokenizer
            if not options.dry_run:
                hub_tokenizer, base = _check_hub_base(erased, base, api.token)
        with _lap(seconds, "stage"):
            if staging_dir is None:
                staging_dir = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter"
            staged = stage_adapter(
                adapter,
                report,
                base_model=base,
                output_dir=staging_dir,
                attacks=attacks,
                verification=probes,
                base_tokenizer=hub_tokenizer,
                method=details.method,
                questions=asked,
                allowed=allow,
                public_sources=() if options.dry_run else _public_sources(api, report),
            )
        with _lap(seconds, "reload"):
            check_reload(erased, tokenizer, staged, probes)

        def write_card(current: str | None) -> None:
            pictures = [name for name in PICTURES if (staged.folder / name).exists()]
            card = make_card(staged.report, repo_id, pictures=pictures, current=current)
            validate_card(card)
            card.save(staged.folder / CARD)
            raise_findings(scan_folder(staged.folder, forget=forget_texts, questions=asked, names=names), allow)

        publication = send_folder(
            api, repo_id, staged.folder, write_card, options, owned=PUBLISHED_FILES, what="the erased adapter"
        )
    return replace(publication, seconds={**seconds, **publication.seconds})


def send_folder(
    api: HfApi,
    repo_id: str,
    folder: Path,
    write_card: Callable[[str | None], None],
    options: PublishOptions,
    *,
    repo_type: str = "model",
    owned: Collection[str],
    what: str,
) -> Publication:
    """Write the card of a staged folder, and send the folder unless this is a dry run.

    `write_card` takes a card, keeps what a person wrote into it, and raises for what the scan of the folder finds. The
    repository is named with its namespace, unless this is a dry run.
    """
    seconds: dict[str, float] = {}
    card = folder / CARD
    with _lap(seconds, "scan"):
        write_card(card.read_text(encoding="utf-8") if card.exists() else None)
    if options.dry_run:
        return Publication(repo_id, None, url_of(api, repo_id, repo_type), changed=False, seconds=seconds)
    with _lap(seconds, "transfer"):
        target = open_repository(api, repo_id, repo_type=repo_type, private=options.private, revision=options.revision)
        if repo_type == "model":
            check_names(target.files, repo_id)  # `load_erased` would refuse what lies there already
        current = read_text(api, target, CARD)
    if current is not None:
        with _lap(seconds, "scan"):
            write_card(current)
    message, create_pr, tag = options.commit_message or f"Publish {what}", options.create_pr, options.tag
    with _lap(seconds, "transfer"):
        publication = commit_folder(api, target, folder, message=message, owned=owned, create_pr=create_pr, tag=tag)
    return replace(publication, seconds=seconds)


def _find_base(api: HfApi, erased: PeftModel, details: CardDetails) -> BaseModel:
    base_model = details.base_model or erased.get_base_model().config._name_or_path
    base_revision, license = details.base_revision, details.license
    if not details.base_model and (not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) or Path(base_model).exists()):
        raise ValueError(
            f"`base_model` is None, and the adapter's base was loaded from {base_model!r}, which is not a Hub id: "
            "give the Hub id of the same weights."
        )
    if license is None or base_revision is None or not re.fullmatch("[0-9a-f]{40}", base_revision):
        with bounded_waits(), named_errors(base_model, f"Reading about the base {base_model}"):
            info = retried(lambda: api.model_info(base_model, revision=base_revision))
        base_revision = info.sha
        license = license or (info.card_data.license if info.card_data else None)
        if license is None:
            raise ValueError(f"`license` is None, and {base_model} states none: say under which the adapter goes.")
    assert base_revision is not None
    return BaseModel(base_model, base_revision, base_fingerprint(erased), license, details.gguf_file)


def _public_sources(api: HfApi, report: Mapping[str, Any]) -> set[str]:
    """Which data sets of the recipe anybody may see, as the Hub says to one who shows no token."""
    public = set()
    for name in sorted(hub_sources(report.get("recipe", {}))):
        try:
            with bounded_waits(), named_errors(name, f"Asking whether the data set {name} is public"):
                if not retried(partial(api.dataset_info, hub_id(name), token=False)).private:
                    public.add(name)
        except HubError:
            logger.warning(f"The data set {name} is private, or the Hub did not say: the card does not name it.")
    return public


def _check_hub_base(
    erased: PeftModel, base: BaseModel, token: str | bool | None
) -> tuple[PreTrainedTokenizerBase, BaseModel]:
    """Hold the base on the Hub to the fingerprint of the one at hand, and return its tokenizer and what it is.

    Where tokens were added, the one at hand has further rows, which the adapter's file brings along.
    """
    # Loaded even where the one at hand came from the Hub: transformers does not keep which commit that was.
    with named_errors(base.id, f"Loading the base {base.id}"):
        hub_model, hub_tokenizer = load_model_and_tokenizer(
            base.id, revision=base.revision, gguf_file=base.gguf_file, token=token if isinstance(token, str) else None
        )
    rows = hub_model.get_input_embeddings().weight.shape[0]
    if rows < erased.get_base_model().get_input_embeddings().weight.shape[0]:
        base = replace(base, fingerprint=base_fingerprint(erased, rows))
    try:
        check_base(hub_model, base.fingerprint, base.id)
    except BaseMismatchError as error:
        raise BaseMismatchError(
            f"`base_model` is {base.id!r} at {base.revision[:8]}, whose weights are not those of `model` (from "
            f"{erased.get_base_model().config._name_or_path!r}): name the repository, `base_revision` and `gguf_file` "
            "that they came from."
        ) from error
    return hub_tokenizer, base


@contextmanager
def _erased_model(
    adapter: str | Path,
    report: Mapping[str, Any],
    model: str | PreTrainedModel | PeftModel | None,
    processing_class: PreTrainedTokenizerBase | None,
) -> Iterator[tuple[PeftModel, PreTrainedTokenizerBase]]:
    recipe, at = report.get("recipe", {}), {}
    if model is None:
        model = recipe.get("model")
        at = {"revision": recipe.get("model_revision"), "gguf_file": recipe.get("gguf_file")}
        if model is None:
            raise ValueError("`model` is None, and the report has no recipe that names it: pass the base.")
    if isinstance(model, str):
        model, processing_class = load_model_and_tokenizer(model, dtype=recipe.get("dtype", "auto"), **at)
    elif processing_class is None:
        raise ValueError("`processing_class` is None: pass the tokenizer of `model`.")
    if isinstance(model, PeftModel):
        yield model, processing_class
        return
    erased = PeftModel.from_pretrained(model, str(adapter))
    try:
        yield erased, processing_class
    finally:
        erased.unload()  # the caller's base is left without the adapter


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


@contextmanager
def _lap(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
