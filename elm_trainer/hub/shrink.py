"""`shrink_adapter`: the nearest adapter of a smaller rank, as servers take it."""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from ..files import RUN_FILE, write_json
from .adapter import Access, FoundAdapter, find_adapter
from .info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT
from .safety import LOADED_FILES


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
    """The update of one module, `scale * b @ a`.

    Args:
        name (`str`): Its name in the weights' file, without the names of the factors.
        keys (`tuple[str, str]`): The factors' names in the file.
        a (`torch.Tensor`): `[rank, in]`.
        b (`torch.Tensor`): `[out, rank]`.
        scale (`float`): Alpha over rank, or over the root of the rank with `use_rslora`.
    """

    name: str
    keys: tuple[str, str]
    a: torch.Tensor
    b: torch.Tensor
    scale: float


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
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"`output_dir` {output} is not an empty folder: name another one.")
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
    write_json(output / ADAPTER_CONFIG, _config_of_rank(found, rank))
    write_json(output / SHRINK_FILE, asdict(shrinkage))
    for name in {*LOADED_FILES, RUN_FILE} - {ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT}:
        if (found.folder / name).is_file():
            shutil.copyfile(found.folder / name, output / name)
    return shrinkage


def adapter_factors(found: FoundAdapter, weights: Mapping[str, torch.Tensor]) -> Iterator[Factors]:
    """The update of each module of an adapter, by the rank and alpha that PEFT gives to it.

    Raises:
        ValueError: if the adapter is more than two factors for each module, has none, or holds values that are not finite.
    """
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
        `tuple`: `a` of `[rank, in]` and `b` of `[out, rank]`, each with the root of the singular values, so that neither is
        large, and rows of zeros where the update has a smaller rank; and all singular values, the largest first. All are in
        float64.
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


def _config_of_rank(found: FoundAdapter, rank: int) -> dict[str, Any]:
    """The adapter's own config, with one rank for all modules and nothing scaled."""
    return {
        **found.config,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
