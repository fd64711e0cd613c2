"""`load_erased`: an adapter from the Hub or a folder on its base, once both are what they say."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..modeling import PACKAGED_MODELS, load_model, load_tokenizer
from .adapter import Access, FoundAdapter, check_base_config, check_tokenizer, find_adapter
from .errors import (
    BaseMismatchError,
    HubError,
    UnsafeAdapterError,
    UploadError,
    bounded_waits,
    first_line,
    named_errors,
)
from .info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, check_base, check_probes
from .safety import add_tokens, check_tensors


logger = logging.get_logger(__name__)


def load_erased(
    repo_or_path: str | Path,
    *,
    base_model: str | PreTrainedModel | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization_config: Any = None,
    allow_mismatch: bool = False,
    verify: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an erased model: a published adapter on the base that it names.

    Nothing is loaded before the checks of [`check_folder`] have passed, no custom code is ever run, and the files must
    be those that `erasure.json` vouches for. Then the base's fingerprint is compared, and each tensor of the adapter
    with what fits the base. Whatever libraries make of a stranger's files ends as one of the errors below.

    Args:
        repo_or_path (`str` or `Path`): Hub id of an adapter, or its folder.
        base_model (`str` or [`~transformers.PreTrainedModel`], *optional*): Base to use instead of the one that the
            adapter names: a Hub id, a folder, a `.gguf` file, `"smollm2-135m-instruct"`, or a model, into which the
            adapter is put.
        revision (`str`, *optional*): Commit, tag or branch of the adapter's repository.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of the base's weights.
        device_map (`str` or `dict`, *optional*): Where the base's weights go.
        quantization_config (`QuantizationConfigMixin`, *optional*): Quantization of the base, e.g. a
            `BitsAndBytesConfig`. Only part of the fingerprint can be compared then.
        allow_mismatch (`bool`, *optional*, defaults to `False`): Whether to continue with a warning where the base is
            not the one the adapter was trained on.
        verify (`bool`, *optional*, defaults to `False`): Whether to ask the questions stored in `erasure.json` again;
            see [`check_probes`].
        token (`str`, *optional*): Token for the Hub, where the one of `hf auth login` is not meant.
        cache_dir (`str` or `Path`, *optional*): Cache of huggingface_hub.
        local_files_only (`bool`, *optional*, defaults to `False`): Whether to load from the cache alone;
            HF_HUB_OFFLINE=1 does the same.

    Returns:
        `tuple`: the model in evaluation mode, and its tokenizer: the adapter's own if it ships one, else the base's.

    Raises:
        UnsafeAdapterError: if adapter or base could run code, harm the base or run without end, or the adapter is not
            what `erasure.json` says.
        BaseMismatchError: if the base is another one.
        VerificationError: if the model answers otherwise than was published.
        HubError: if the adapter or its base can't be found, reached or read, or a folder here has the name of the base.
        ValueError: if `verify` is asked of an adapter without `erasure.json`.
    """
    access = Access(token, cache_dir, local_files_only)
    adapter = find_adapter(repo_or_path, revision, access)
    if verify and (adapter.info is None or not adapter.info.verification):
        raise ValueError(
            f"`verify` is True, but {adapter.name} stores no questions to ask again in {INFO_FILE}: leave `verify` out."
        )
    model, tokenizer = load_found(
        {"default": adapter},
        base_model,
        access,
        allow_mismatch=allow_mismatch,
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization_config,
    )
    if verify and adapter.info is not None:
        try:
            with _strangers_files(f"The questions stored in {INFO_FILE} of {adapter.name} could not be asked"):
                check_probes(model, tokenizer, adapter.info.verification)
        except BaseException:
            # A model that was handed in goes back as it came.
            model.unload()
            raise
    return model, tokenizer


def load_found(
    found: Mapping[str, FoundAdapter],
    base_model: str | PreTrainedModel | None,
    access: Access,
    *,
    allow_mismatch: bool = False,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization_config: Any = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Put adapters that [`find_adapter`] found on one base, each under its name; takes and raises what [`load_erased`] does.

    Returns:
        `tuple`: the model in evaluation mode with the first adapter active, and the first adapter's tokenizer.
    """
    _check_bases(found, allow_mismatch)
    base, tokenizer = load_base(
        next(iter(found.values())),
        base_model,
        access,
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization_config,
    )
    for adapter in found.values():
        _check_fit(adapter, base, tokenizer, allow_mismatch=allow_mismatch)
    model: Any = base
    for name, adapter in found.items():
        with _strangers_files(f"{adapter.name} could not be put on its base"):
            if model is base:
                model = PeftModel.from_pretrained(base, adapter.folder, adapter_name=name, torch_device="cpu")
            else:
                model.load_adapter(adapter.folder, name, torch_device="cpu")
    return model.eval(), tokenizer


def _check_bases(found: Mapping[str, FoundAdapter], allow_mismatch: bool) -> None:
    """Compare what the adapters say of their bases, before one is loaded."""
    known = {name: adapter.info.base_model for name, adapter in found.items() if adapter.info is not None}
    for name, other in known.items():
        first_name, first = next(iter(known.items()))
        shared = first.fingerprint.keys() & other.fingerprint.keys()
        if all(first.fingerprint[key] == other.fingerprint[key] for key in shared):
            continue
        message = (
            f"{first_name} was trained on {first.id} ({first.revision[:12]}), {name} on {other.id} "
            f"({other.revision[:12]}), and their weights differ: take erasures of one base, or pass "
            "`allow_mismatch=True`."
        )
        if not allow_mismatch:
            raise BaseMismatchError(message)
        logger.warning(message)


def load_base(
    adapter: FoundAdapter,
    base_model: str | PreTrainedModel | None,
    access: Access,
    *,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization_config: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base of an adapter, and the tokenizer: the adapter's own if it ships one; takes what [`load_erased`] takes."""
    if isinstance(base_model, PeftModel):
        raise ValueError("`base_model` carries an adapter already: `unload()` it, or pass its `get_base_model()`.")
    if isinstance(base_model, PreTrainedModel):
        name = base_model.config._name_or_path or adapter.base_id or ""
    else:
        name = base_model or named_base(adapter)
    revision = gguf_file = None
    if adapter.info is not None and name == adapter.info.base_model.id:
        revision, gguf_file = adapter.info.base_model.revision, adapter.info.base_model.gguf_file
    elif base_model is None:
        revision = adapter.config.get("revision")
    options: dict[str, Any] = dict(
        revision=revision,
        gguf_file=gguf_file,
        token=access.token,
        cache_dir=access.cache_dir,
        local_files_only=access.local_files_only,
    )
    at = f" at {revision}" if revision else ""
    with bounded_waits(), _strangers_files(f"The base model {name}{at} of {adapter.name} could not be loaded", name):
        if isinstance(base_model, PreTrainedModel):
            base = base_model
        else:
            check_base_config(name, revision, access)
            base = load_model(
                name,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization_config,
                # Weights that a stranger named are read in no format that could run code.
                use_safetensors=True if base_model is None else None,
                **options,
            )
    own = (adapter.folder / "tokenizer_config.json").exists()
    whose = adapter.name if own else f"the base model {name}{at} of {adapter.name}"
    with bounded_waits(), _strangers_files(f"The tokenizer of {whose} could not be loaded", name):
        tokenizer = load_tokenizer(str(adapter.folder)) if own else load_tokenizer(name, **options)
        check_tokenizer(tokenizer, whose)
    return base, tokenizer


def _check_fit(
    adapter: FoundAdapter, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, allow_mismatch: bool = False
) -> None:
    """Check that an adapter belongs on a base: fingerprint, tensors and tokens; raises what [`load_erased`] raises."""
    if adapter.info is not None:
        try:
            check_base(base, adapter.info.base_model.fingerprint, adapter.info.base_model.id)
        except (BaseMismatchError, ValueError) as error:
            if not allow_mismatch:
                raise
            logger.warning(str(error))
    weights = adapter.folder / ADAPTER_WEIGHTS
    with _strangers_files(f"{adapter.name} could not be compared with its base"):
        rows = base.get_input_embeddings().weight.shape[0]
        added = len(tokenizer) > rows and add_tokens(weights, adapter.config, base, len(tokenizer))
        check_tensors(weights, adapter.config, base, embeddings=added)
        rows = base.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UnsafeAdapterError(
            f"{adapter.name}: the tokenizer knows {len(tokenizer)} tokens, but the base has {rows} embeddings: they do "
            "not belong together."
        )


def named_base(adapter: FoundAdapter) -> str:
    """What the adapter calls its base, if that is something to load here."""
    name = adapter.base_id
    if not name:
        raise HubError(f"{adapter.name} names no base in {ADAPTER_CONFIG}: pass `base_model`.")
    # An adapter that was trained here may name a folder of this machine. One from elsewhere has no business with them.
    here = os.path.isdir(adapter.name)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        if here and os.path.isdir(name):
            return name
        raise HubError(
            f"{adapter.name} was trained on {name[:200]}, which is no id on the Hub and no folder here: pass `base_model`."
        ) from error
    if os.path.exists(name):
        if adapter.info is not None or not here:
            raise HubError(
                f"{adapter.name} was trained on {name} of the Hub, but there is a folder or file {name} here, which would be "
                f"taken for it: load it from another place, or pass `base_model`, e.g. './{name}' for the folder."
            )
        logger.warning(
            f"{adapter.name} was trained on {name}: taking the folder of that name, not the Hub's repository."
        )
    return name


@contextmanager
def _strangers_files(what: str, name: str = "") -> Iterator[None]:
    """Whatever libraries make of files that somebody else wrote becomes a `HubError` that says what was tried."""
    try:
        with named_errors(name, what):
            yield
    except (UploadError, OSError) as error:
        cause = error.__cause__ if isinstance(error, UploadError) else error
        raise HubError(
            f"{what} ({first_line(cause or error)}). Check the network; for a gated or private model run `hf auth login`; "
            "offline, load it once before; or name a copy with `base_model`."
        ) from error
    except HubError:
        raise
    except BaseException as error:
        # tokenizers panics on some files; what Rust makes of that is no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, ImportError) and name in PACKAGED_MODELS:
            raise
        raise HubError(
            f"{what} ({first_line(error)}). Its files may be broken, or not for the installed transformers and PEFT: name "
            "another copy, or ask its author."
        ) from error
