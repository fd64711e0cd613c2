"""Erased models: `load_erased` puts an adapter on its base, once both are what they say; `stack_erasures` several, as one;
`merge_erased` makes full weights of both."""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..fingerprint import is_quantized
from ..modeling import load_model, load_tokenizer
from .adapter import Access, FoundAdapter, check_base_config, check_tokenizer, find_adapter, strangers_files
from .errors import (
    BaseMismatchError,
    UnsafeAdapterError,
)
from .info import ADAPTER_WEIGHTS, INFO_FILE, check_base, check_probes, check_same_base
from .safety import add_tokens, check_tensors


logger = logging.get_logger(__name__)
# PEFT saves an adapter of this name into the folder itself, which is how adapters are published.
STACK = "default"
COMBINATIONS = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


class Loading(TypedDict, total=False):
    """How weights are loaded, see [`load_erased`]."""

    dtype: str
    device_map: str | dict[str, Any] | None
    quantization_config: Any


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
    loading = Loading(dtype=dtype, device_map=device_map, quantization_config=quantization_config)
    model, tokenizer = load_found({"default": adapter}, base_model, access, allow_mismatch=allow_mismatch, **loading)
    if verify and adapter.info is not None:
        try:
            with strangers_files(f"The questions stored in {INFO_FILE} of {adapter.name} could not be asked"):
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
    **loading: Unpack[Loading],
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Put adapters that [`find_adapter`] found on one base, each under its name; takes and raises what [`load_erased`] does.

    Returns:
        `tuple`: the model in evaluation mode with the first adapter active, and the first adapter's tokenizer.
    """
    infos = {name: adapter.info for name, adapter in found.items() if adapter.info is not None}
    check_same_base({name: info.base_model for name, info in infos.items()}, allow_mismatch)
    base, tokenizer = load_base(next(iter(found.values())), base_model, access, **loading)
    for adapter in found.values():
        _check_fit(adapter, base, tokenizer, allow_mismatch)
    model: Any = base
    for name, adapter in found.items():
        with strangers_files(f"{adapter.name} could not be put on its base"):
            if model is base:
                model = PeftModel.from_pretrained(base, adapter.folder, adapter_name=name, torch_device="cpu")
            else:
                model.load_adapter(adapter.folder, name, torch_device="cpu")
    return model.eval(), tokenizer


def load_base(
    adapter: FoundAdapter, base_model: str | PreTrainedModel | None, access: Access, **loading: Unpack[Loading]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base of an adapter, and the tokenizer: the adapter's own if it ships one; takes what [`load_found`] takes."""
    if isinstance(base_model, PeftModel):
        raise ValueError("`base_model` carries an adapter already: `unload()` it, or pass its `get_base_model()`.")
    if isinstance(base_model, PreTrainedModel):
        name = base_model.config._name_or_path or adapter.base_id or ""
    else:
        name = base_model or adapter.named_base()
    revision = gguf_file = None
    if adapter.info is not None and name == adapter.info.base_model.id:
        revision, gguf_file = adapter.info.base_model.revision, adapter.info.base_model.gguf_file
    elif base_model is None:
        revision = adapter.config.get("revision")
    options: dict[str, Any] = dict(revision=revision, gguf_file=gguf_file, **vars(access))
    told = f"base model {name}{f' at {revision}' if revision else ''} of {adapter.name}"
    with strangers_files(f"The {told} could not be loaded", name):
        if isinstance(base_model, PreTrainedModel):
            base = base_model
        else:
            check_base_config(name, revision, access)
            # Weights that a stranger named are read in no format that could run code.
            base = load_model(name, use_safetensors=True if base_model is None else None, **loading, **options)
    own = (adapter.folder / "tokenizer_config.json").exists()
    whose = adapter.name if own else f"the {told}"
    with strangers_files(f"The tokenizer of {whose} could not be loaded", name):
        tokenizer = load_tokenizer(str(adapter.folder)) if own else load_tokenizer(name, **options)
        check_tokenizer(tokenizer, whose)
    return base, tokenizer


def _check_fit(
    adapter: FoundAdapter, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, allow_mismatch: bool
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
    with strangers_files(f"{adapter.name} could not be compared with its base"):
        rows = base.get_input_embeddings().weight.shape[0]
        added = len(tokenizer) > rows and add_tokens(weights, adapter.config, base, len(tokenizer))
        check_tensors(weights, adapter.config, base, embeddings=added)
        rows = base.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UnsafeAdapterError(
            f"{adapter.name}: the tokenizer knows {len(tokenizer)} tokens, but the base has {rows} embeddings: they do "
            "not belong together."
        )


def stack_erasures(
    adapters: Mapping[str, str | Path],
    *,
    weights: Mapping[str, float] | None = None,
    combination: str = "cat",
    density: float | None = None,
    svd_rank: int | None = None,
    base_model: str | PreTrainedModel | None = None,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization_config: Any = None,
    allow_mismatch: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load several erasures of the same base, and combine them into one active adapter.

    The single adapters stay in the model under their names: `set_adapter` goes back to one, `delete_adapter` drops it,
    and `save_pretrained(folder, selected_adapters=["default"])` saves the stack alone. No report of the single erasures
    says anything about the stack: measure it anew with `evaluate_erasure(model, None, [...], tokenizer)`.

    Args:
        adapters (`Mapping[str, str | Path]`): Hub ids or folders of the erasures, by a name of your choice for each.
        weights (`Mapping[str, float]`, *optional*): Strength of each; 1 by default.
        combination (`str`, *optional*, defaults to `"cat"`): How PEFT combines them. `"cat"` is the exact sum, its
            rank the sum of the ranks. `"svd"` brings the sum to a rank; `"linear"`, cheap and rough, and the pruning
            ones (`"ties"`, `"dare_linear"`, `"dare_ties"`, `"magnitude_prune"`, each also with `_svd`) change it.
        density (`float`, *optional*): Share of the weights that the pruning combinations keep. They need it.
        svd_rank (`int`, *optional*): Rank of the combinations by SVD; the largest of the adapters' ranks by default.
        base_model (`str` or [`~transformers.PreTrainedModel`], *optional*): Base to use instead of the one that the
            first adapter names; see [`load_erased`].
        dtype (`str`), device_map (`str` or `dict`), quantization_config (`QuantizationConfigMixin`), token (`str`):
            See [`load_erased`], as for the following ones.
        allow_mismatch (`bool`, *optional*, defaults to `False`): Whether to continue with a warning where the base is
            not that of every adapter.
        cache_dir (`str` or `Path`, *optional*), local_files_only (`bool`, *optional*, defaults to `False`):
            See [`load_erased`].

    Returns:
        `tuple`: the model in evaluation mode with the stack active, and the first adapter's tokenizer.

    Raises:
        TypeError: if `adapters` is no mapping.
        ValueError: for names, weights or a combination that can't be used, or adapters that can't be combined so.
        BaseMismatchError: if the adapters belong to different bases, or the base to none of them.
        UnsafeAdapterError, HubError: see [`load_erased`].
    """
    strengths = _check_arguments(adapters, weights, combination, density)
    access = Access(token, cache_dir, local_files_only)
    found = {name: find_adapter(place, None, access) for name, place in adapters.items()}
    _check_combination(found, combination)
    loading = Loading(dtype=dtype, device_map=device_map, quantization_config=quantization_config)
    model, tokenizer = load_found(found, base_model, access, allow_mismatch=allow_mismatch, **loading)
    tuner: Any = model.base_model
    own: dict[str, LoraConfig] = {name: model.peft_config[name] for name in strengths}
    try:
        for name, config in own.items():
            # PEFT takes the settings of the stack from the first adapter: its layers, so that what only others adapt
            # would be lost, and its `use_rslora`, which would scale the stack a second time. Modules named one by one
            # leave nothing to be taken over.
            adapted = {
                module
                for module, layer in model.get_base_model().named_modules()
                if isinstance(layer, LoraLayer) and (name in layer.lora_A or name in layer.lora_embedding_A)
            }
            selection = dict(exclude_modules=None, layers_to_transform=None, layers_pattern=None)
            model.peft_config[name] = replace(config, target_modules=adapted, use_rslora=False, **selection)
        tuner.add_weighted_adapter(
            [*strengths], [*strengths.values()], STACK, combination, svd_rank=svd_rank, density=density
        )
    finally:
        model.peft_config.update(own)
    model.set_adapter(STACK)
    model.requires_grad_(False)  # `set_adapter` made the stack trainable
    return model.eval(), tokenizer


def _check_arguments(
    adapters: Mapping[str, str | Path], weights: Mapping[str, float] | None, combination: str, density: float | None
) -> dict[str, float]:
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"`adapters` is of type {type(adapters).__name__}: give each a name, {{'first': folder, 'second': folder}}."
        )
    if len(adapters) < 2:
        raise ValueError(
            f"`adapters` holds {len(adapters)} erasures, but a stack needs two: use `load_erased` for one."
        )
    for name in adapters:
        if name == STACK or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or "lora" in name.lower():
            raise ValueError(
                f"`adapters` names one {name!r}: use letters, digits, `_` and `-`, neither {STACK!r}, which is the "
                "stack's name, nor `lora`, which PEFT looks for in names of weights."
            )
    if combination not in COMBINATIONS:
        raise ValueError(f"`combination` is {combination!r}; use: {', '.join(COMBINATIONS)}.")
    pruned = any(word in combination for word in ("ties", "dare", "magnitude"))
    if pruned and not (density is not None and 0 < density <= 1):
        raise ValueError(f"`density` is {density}, but {combination!r} keeps a share of the weights: use e.g. 0.5.")
    if unknown := sorted((weights or {}).keys() - adapters.keys()):
        raise ValueError(f"`weights` names {unknown}, but `adapters` holds {list(adapters)}.")
    return {name: float((weights or {}).get(name, 1.0)) for name in adapters}


def _check_combination(found: Mapping[str, FoundAdapter], combination: str) -> None:
    for name, adapter in found.items():
        for field in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"):
            if adapter.config.get(field):
                raise ValueError(
                    f"{name} has `{field}` {adapter.config[field]!r}, which PEFT can't combine: leave it out of the stack."
                )
    if combination != "cat" and not combination.endswith("svd"):
        ranks = {
            name: max(
                adapter.config.get("r") or LoraConfig.r, *(adapter.config.get("rank_pattern") or {"": 0}).values()
            )
            for name, adapter in found.items()
        }
        if len(set(ranks.values())) > 1:
            raise ValueError(
                f'`combination` is {combination!r}, which needs equal ranks, but they are {ranks}: use "cat" or "svd".'
            )


def merge_erased(
    model: PeftModel, processing_class: PreTrainedTokenizerBase, output_dir: str | Path, max_shard_size: str = "5GB"
) -> Path:
    """Write the full weights of an erased model, with its active adapter merged, and its tokenizer.

    The model itself stays as it is, so both are in memory for a moment. Weights are added in the type of the
    base: in bfloat16 the result is rounded, in float32 it gives the logits of the adapter to about 1e-5.

    Args:
        model (`PeftModel`): Erased model, as [`load_erased`] returns it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        output_dir (`str` or `Path`): New or empty folder.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Size at which the safetensors are split.

    Returns:
        `Path`: the folder, for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        TypeError: if the model has no adapter.
        FileExistsError: if the folder holds something.
        ValueError: if the base is quantized, the adapter can't be merged, or merging would leave NaN in the weights.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"`model` is of type {type(model).__name__}, which has no adapter to merge: give the `PeftModel` of `load_erased`."
        )
    output = empty_folder(output_dir)
    if is_quantized(model):
        raise ValueError(
            "The base is quantized, and merging would round the erasure away: load the adapter without "
            '`quantization_config`, e.g. `load_erased(..., dtype="bfloat16")`, and merge that.'
        )
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    # Who gets the files need not know where the base came from, least of all a folder of this machine.
    merged.config._name_or_path = ""
    merged.save_pretrained(output, max_shard_size=max_shard_size)
    processing_class.save_pretrained(output)
    return output


def empty_folder(output_dir: str | Path) -> Path:
    """The folder that is to be written; raises `FileExistsError` if it holds something."""
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"`output_dir` {output} is not an empty folder: name another one.")
    return output
