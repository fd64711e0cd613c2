"""Adapters made of adapters: `stack_erasures`, several in one; `shrink_adapter`, the nearest of a smaller rank, as servers take it."""

import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import RUN_FILE, write_json
from .adapter import Access, FoundAdapter, find_adapter
from .info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT
from .load import load_found
from .safety import LOADED_FILES


# PEFT saves an adapter of this name into the folder itself, which is how adapters are published.
STACK = "default"
COMBINATIONS = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


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
    model, tokenizer = load_found(
        found,
        base_model,
        access,
        allow_mismatch=allow_mismatch,
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization_config,
    )
    _combine(model, strengths, combination, density, svd_rank)
    model.set_adapter(STACK)
    model.requires_grad_(False)  # `set_adapter` made the stack trainable
    return model.eval(), tokenizer


def _combine(
    model: PeftModel, strengths: Mapping[str, float], combination: str, density: float | None, svd_rank: int | None
) -> None:
    tuner: Any = model.base_model
    own: dict[str, LoraConfig] = {name: model.peft_config[name] for name in strengths}
    try:
        for name, config in own.items():
            # PEFT takes the settings of the stack from the first adapter: its layers, so that what only others adapt
            # would be lost, and its `use_rslora`, which would scale the stack a second time. Modules named one by one
            # leave nothing to be taken over.
            model.peft_config[name] = replace(
                config,
                target_modules={
                    module
                    for module, layer in model.get_base_model().named_modules()
                    if isinstance(layer, LoraLayer) and (name in layer.lora_A or name in layer.lora_embedding_A)
                },
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
                use_rslora=False,
            )
        tuner.add_weighted_adapter(
            list(strengths),
            list(strengths.values()),
            STACK,
            combination_type=combination,
            density=density,
            svd_rank=svd_rank,
        )
    finally:
        model.peft_config.update(own)


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


# What PEFT calls the factors of a linear module, and those of an embedding.
FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
SHRINK_FILE = "shrink.json"


@dataclass(frozen=True)
class Shrinkage:
    """What shrinking an adapter has left of it.

    Args:
        rank_before (`int`): Largest rank of a module of the adapter.
        rank (`int`): Rank of every module of the new one.
        kept (`float`): Share of the squared Frobenius norm of all updates together that is left, from 0 to 1.
        modules (`dict[str, float]`): The same of each module's update; 1 for an update of zeros.
    """

    rank_before: int
    rank: int
    kept: float
    modules: dict[str, float]


@dataclass(frozen=True)
class Factors:
    """The update of one module, `scale * b @ a`."""

    name: str  # in the weights' file, without the names of the factors
    keys: tuple[str, str]  # of the factors in the file
    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    scale: float  # alpha over rank, or over the root of the rank with `use_rslora`


def shrink_adapter(
    adapter: str | Path,
    rank: int,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Shrinkage:
    """Write the adapter of a smaller rank that is nearest to an adapter, module by module.

    The update of each module is cut to its largest singular values, which leaves the least squared difference that any
    matrix of this rank can have (Eckart and Young, 1936). No base is loaded. In the new adapter every module has the same
    rank and `lora_alpha` equals it, so that nothing is scaled and servers without `rank_pattern` read it rightly. Weights
    of `modules_to_save` and of single tokens are copied, as are the tokenizer and `erasure_run.json`. Reports are not: they
    say nothing about the new adapter. Measure it.

    Args:
        adapter (`str` or `Path`): Folder of an adapter, or its id on the Hub.
        rank (`int`): Largest rank of the new one. Where no module has a larger one, nothing but rounding is lost.
        output_dir (`str` or `Path`): New or empty folder. `shrink.json` in it holds what is returned.
        revision (`str`, *optional*): Commit, tag or branch of the adapter's repository.
        token (`str`, *optional*): Token for the Hub, where the one of `hf auth login` is not meant.
        cache_dir (`str` or `Path`, *optional*), local_files_only (`bool`, *optional*, defaults to `False`):
            See [`load_erased`].

    Returns:
        [`Shrinkage`]: what is left, in all and of each module.

    Raises:
        FileExistsError: if the folder holds something.
        TypeError: if `rank` is no integer.
        ValueError: if `rank` is below 1, or the adapter is more than a product of two factors for each module (DoRA,
            biases of LoRA, whole parameters), or has none, or values that are not finite.
        UnsafeAdapterError, HubError: see [`load_erased`].
    """
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"`rank` is {rank!r}: give an integer, such as 16.")
    if rank < 1:
        raise ValueError(f"`rank` is {rank}: it must be at least 1.")
    output = empty_folder(output_dir)
    found = find_adapter(adapter, revision, Access(token, cache_dir, local_files_only))
    weights = load_file(found.folder / ADAPTER_WEIGHTS)
    modules = list(adapter_factors(found, weights))
    before = max(module.a.shape[0] for module in modules)
    rank = min(rank, before)
    kept: dict[str, float] = {}
    left = whole = 0.0
    for module in modules:
        a, b, values = nearest_of_rank(module, rank)
        for key, factor in zip(module.keys, (a, b), strict=True):
            weights[key] = factor.to(weights[key].dtype).contiguous()
        squares = values.square()
        own_left, own_whole = float(squares[:rank].sum()), float(squares.sum())
        kept[module.name] = own_left / own_whole if own_whole else 1.0
        left, whole = left + own_left, whole + own_whole
    shrinkage = Shrinkage(before, rank, left / whole if whole else 1.0, kept)
    output.mkdir(parents=True, exist_ok=True)
    save_file(weights, output / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    of_rank = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    write_json(output / ADAPTER_CONFIG, {**found.config, **of_rank, "init_lora_weights": True, "inference_mode": True})
    write_json(output / SHRINK_FILE, asdict(shrinkage))
    for name in {*LOADED_FILES, RUN_FILE} - {ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT}:
        if (found.folder / name).is_file():
            shutil.copyfile(found.folder / name, output / name)
    return shrinkage


def empty_folder(output_dir: str | Path) -> Path:
    """The folder that is to be written; raises `FileExistsError` if it holds something."""
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"`output_dir` {output} is not an empty folder: name another one.")
    return output


def adapter_factors(found: FoundAdapter, weights: Mapping[str, torch.Tensor]) -> Iterator[Factors]:
    """The update of each module of an adapter, by the rank and alpha that PEFT gives to it; raises `ValueError` as above."""
    config = found.config
    for field in ("use_dora", "lora_bias", "target_parameters"):
        if config.get(field):
            raise ValueError(
                f"{found.name} has `{field}` {config[field]!r}, so that its updates are more than a product of two factors: "
                "merge it into full weights instead, with `merge_erased` or `elm export`."
            )
    if not any(key.endswith(FACTORS[0][0]) or key.endswith(FACTORS[1][0]) for key in weights):
        raise ValueError(f"{found.name} holds no factors of LoRA in {ADAPTER_WEIGHTS}: give the folder of an adapter.")
    patterns = config.get("alpha_pattern") or {}
    for key, a in weights.items():
        for ending, other in FACTORS:
            if key.endswith(ending):
                name = key.removesuffix(ending)
                b = weights.get(name + other)
                if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                    raise ValueError(f"{found.name}: the factors of {name} are no two matrices of one rank.")
                if not (a.isfinite().all() and b.isfinite().all()):
                    raise ValueError(f"{found.name} holds values in {name} that are not finite: train it anew.")
                plain = name.removeprefix("base_model.model.")
                alpha = patterns.get(get_pattern_key(patterns, plain), config.get("lora_alpha", LoraConfig.lora_alpha))
                own = a.shape[0]
                scale = alpha / (math.sqrt(own) if config.get("use_rslora") else own)
                yield Factors(plain, (key, name + other), a, b, scale)


def nearest_of_rank(module: Factors, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nearest product of two factors of a rank, and the singular values of the update.

    With `b = Q R` and `a.T = P S` the update is `Q (scale * R @ S.T) P.T`, and the matrix in the middle, no larger than
    the adapter's rank, has its singular values: the large one is never made.

    Returns:
        `tuple`, in float64: `a` of `[rank, in]` and `b` of `[out, rank]`, each with the root of the singular values, so that
        neither is large, and zeros where the update has a smaller rank; and all singular values, the largest first.
    """
    q, r = torch.linalg.qr(module.b.double())
    p, s = torch.linalg.qr(module.a.double().T)
    u, values, v = torch.linalg.svd(module.scale * r @ s.T, full_matrices=False)
    count = min(rank, len(values))
    roots = values[:count].sqrt()
    a = torch.zeros(rank, module.a.shape[1], dtype=torch.float64)
    b = torch.zeros(module.b.shape[0], rank, dtype=torch.float64)
    a[:count] = (p @ v[:count].T * roots).T
    b[:, :count] = q @ u[:, :count] * roots
    return a, b, values
