"""An adapter for other programs: `export_gguf_adapter` and `export_gguf` for llama.cpp, `shrink_adapter` for servers that take a rank."""

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, Keys
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from ..files import RUN_FILE, replacing, write_json
from ..modeling import load_config, locate, reading_gguf_once
from .adapter import Access, FoundAdapter, find_adapter
from .info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT
from .load import empty_folder
from .safety import LOADED_FILES


# Families whose tensors are known to lie in GGUF as they are read here. Others may be stored otherwise than they are
# trained, and an adapter on them would be wrong without a word.
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA}
TYPES = {kind: GGMLQuantizationType[kind.upper()] for kind in ("f32", "f16", "bf16", "q8_0")}
# What PEFT calls the factors of a linear module, and those of an embedding.
FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


@dataclass(frozen=True)
class Factors:
    """The update of one module, `scale * b @ a`."""

    name: str  # in the weights' file, without the names of the factors
    keys: tuple[str, str]  # of the factors in the file
    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    scale: float  # alpha over rank, or over the root of the rank with `use_rslora`


def export_gguf_adapter(
    adapter: str | Path,
    output_file: str | Path,
    *,
    base_model: str | None = None,
    dtype: str = "f32",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Write an adapter as a GGUF file, which llama.cpp (`--lora`) and Ollama (`ADAPTER`) put on a GGUF of its base.

    That GGUF may be quantized as one likes. No weights of the base are loaded, only its config.

    Args:
        adapter (`str` or `Path`): Folder of an adapter, or its id on the Hub.
        output_file (`str` or `Path`): The file, which must not exist.
        base_model (`str`, *optional*): Base, where the adapter names none that can be found here: a Hub id, a folder, a
            `.gguf` file, or `"smollm2-135m-instruct"`.
        dtype (`str`, *optional*, defaults to `"f32"`): Type of the tensors, in `TYPES`.
        revision (`str`), token (`str`), cache_dir (`str` or `Path`), local_files_only (`bool`): See [`load_erased`].

    Returns:
        `Path`: the file.

    Raises:
        FileExistsError: if the file exists.
        ValueError: if the base's family is not in `ARCHITECTURES`, the adapter holds more than factors of linear
            modules in layers, as embeddings and whole modules, or `dtype` is unknown.
        UnsafeAdapterError, HubError: see [`load_erased`].
    """
    output, kind = _check(output_file, dtype)
    access = Access(token, cache_dir, local_files_only)
    found = find_adapter(adapter, revision, access)
    name = base_model or found.named_base()
    own = found.info.base_model if base_model is None and found.info else None
    pinned: dict[str, Any] = {"revision": own.revision, "gguf_file": own.gguf_file} if own else {}
    config = load_config(name, **pinned, **vars(access))
    modules = dict(_gguf_modules(found, config, name))
    # One alpha is all that the file holds; what a module's own rank and scale differ from it goes into its B.
    first = next(iter(modules.values()))
    alpha = first.scale * first.a.shape[0]
    with _writing(output, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for name, module in modules.items():
            b = module.b.double().numpy() * (module.scale * module.a.shape[0] / alpha)
            _add(writer, f"{name}.lora_a", module.a.float().numpy(), kind)
            _add(writer, f"{name}.lora_b", _reordered(name, b, config), kind)
    return output


def export_gguf(
    adapter: str | Path,
    output_file: str | Path,
    *,
    base_file: str | Path | None = None,
    dtype: str = "f16",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Write a GGUF model with an adapter merged into it.

    What the adapter does not change, as tokenizer, settings and all other tensors, is taken over from the file byte for
    byte, with its quantization. Tensors that it changes are written in `dtype`: quantized as strongly as the rest, part of
    the erasure would be rounded away.

    Args:
        adapter (`str` or `Path`): Folder of an adapter, or its id on the Hub.
        output_file (`str` or `Path`): The file, which must not exist.
        base_file (`str` or `Path`, *optional*): The base as a GGUF file; by default the one on which the adapter was
            trained. It must be the same model: only the shapes of the tensors are compared.
        dtype (`str`, *optional*, defaults to `"f16"`): Type of the changed tensors, in `TYPES`.
        revision (`str`), token (`str`), cache_dir (`str` or `Path`), local_files_only (`bool`): See [`load_erased`].

    Returns:
        `Path`: the file.

    Raises:
        FileExistsError: if the file exists.
        FileNotFoundError: if there is no `base_file`.
        ValueError: as of [`export_gguf_adapter`], if the adapter was trained on no GGUF file and none is given, or if that
            has no tensor of the right shape for a module.
        UnsafeAdapterError, HubError: see [`load_erased`].
    """
    output, kind = _check(output_file, dtype)
    found = find_adapter(adapter, revision, Access(token, cache_dir, local_files_only))
    if base_file is None:
        name = found.named_base()
        place, file = locate(name, None)
        if file is None:
            raise ValueError(
                f"`base_file` is None, but {found.name} was trained on {name}, which is no GGUF file here: give one of the "
                "same model."
            )
        base_file = Path(place) / file
    base = Path(base_file)
    if not base.is_file():
        raise FileNotFoundError(f"`base_file` is {str(base)!r}, which does not exist: give the base as a .gguf file.")
    with reading_gguf_once():
        config = load_config(str(base))
        reader = gguf.GGUFReader(base)
    modules = dict(_gguf_modules(found, config, base.name))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, module in modules.items():
        wanted = (module.b.shape[0], module.a.shape[1])
        has = tuple(int(size) for size in reversed(tensors[name].shape)) if name in tensors else None
        if has != wanted:
            raise ValueError(
                f"`base_file` {base.name} has {f'{name} of the shape {has}' if has else f'no {name}'}, but {found.name} "
                f"changes one of the shape {wanted}: give the GGUF file of its base."
            )
    with _writing(output, reader.fields[Keys.General.ARCHITECTURE].contents()) as writer:
        for field in reader.fields.values():
            # The writer writes these itself.
            if field.name != Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
                sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
        for name, tensor in tensors.items():
            if name not in modules:
                writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
                continue
            module = modules[name]
            update = module.scale * module.b.double().numpy() @ module.a.double().numpy()
            values = gguf.dequantize(tensor.data, tensor.tensor_type) + _reordered(name, update, config)
            _add(writer, name, values, kind)
    return output


def _check(output_file: str | Path, dtype: str) -> tuple[Path, GGMLQuantizationType]:
    if dtype not in TYPES:
        raise ValueError(f"`dtype` is {dtype!r}: use {', '.join(TYPES)}.")
    output = Path(output_file)
    if output.exists():
        raise FileExistsError(f"`output_file` {output} exists: name another one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output, TYPES[dtype]


@contextmanager
def _writing(output: Path, architecture: str) -> Iterator[GGUFWriter]:
    """Writes a GGUF file of what the block adds to it, once the block has ended."""
    with replacing(output) as unfinished:
        writer = GGUFWriter(unfinished, architecture)
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _gguf_modules(found: FoundAdapter, config: PreTrainedConfig, base: str) -> Iterator[tuple[str, Factors]]:
    """The update of each module by the name of the tensor that it changes, in a base of this name."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"`base_model` {base} is of the family {config.model_type!r}, but GGUF files are written for "
            f"{', '.join(ARCHITECTURES)} alone: `merge_erased`, and llama.cpp's convert_hf_to_gguf.py on its folder."
        )
    weights = load_file(found.folder / ADAPTER_WEIGHTS)
    linear = list(_adapter_factors(found, weights))
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    known = {key for module in linear for key in module.keys}
    if further := [key for key in weights if key not in known or key.endswith(FACTORS[1])]:
        raise ValueError(
            f"{found.name} holds {further[0]}, but only linear modules with LoRA can be written: merge it into full weights, "
            "with `merge_erased`, and convert those by llama.cpp's convert_hf_to_gguf.py."
        )
    for module in linear:
        name = names.get_name(module.name)
        if name is None:
            raise ValueError(
                f"{found.name} adapts {module.name}, which no {config.model_type} model of {config.num_hidden_layers} layers "
                "has."
            )
        yield f"{name}.weight", module


def _reordered(name: str, rows: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    """Rows of a matrix in the order of GGUF.

    transformers rotates the first half of a head against its second half, llama.cpp each even row against the odd one
    behind it, so that in queries and keys of Llama the rows of each head are interleaved.
    """
    counts = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    heads = counts.get(name.split(".")[-2])
    if heads is None:
        return rows
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _add(writer: GGUFWriter, name: str, values: np.ndarray, kind: GGMLQuantizationType) -> None:
    values = np.ascontiguousarray(values, dtype=np.float32)
    # Rows that cannot be cut into whole blocks keep their numbers.
    if kind == GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
        kind = GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


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
        revision (`str`), token (`str`), cache_dir (`str` or `Path`), local_files_only (`bool`): See [`load_erased`].

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
    modules = list(_adapter_factors(found, weights))
    before = max(module.a.shape[0] for module in modules)
    rank = min(rank, before)
    kept: dict[str, float] = {}
    left = whole = 0.0
    for module in modules:
        a, b, values = _nearest_of_rank(module, rank)
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
    write_json(output / "shrink.json", asdict(shrinkage))
    for name in {*LOADED_FILES, RUN_FILE} - {ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT}:
        if (found.folder / name).is_file():
            shutil.copyfile(found.folder / name, output / name)
    return shrinkage


def _adapter_factors(found: FoundAdapter, weights: Mapping[str, torch.Tensor]) -> Iterator[Factors]:
    """The update of each module of an adapter, by the rank and alpha that PEFT gives to it; raises `ValueError` as above."""
    config = found.config
    for field in ("use_dora", "lora_bias", "target_parameters"):
        if config.get(field):
            raise ValueError(
                f"{found.name} has `{field}` {config[field]!r}, so that its updates are more than a product of two factors: "
                "merge it into full weights instead, with `merge_erased` or `elm export`."
            )
    pairs = [(key, key.removesuffix(end), other) for key in weights for end, other in FACTORS if key.endswith(end)]
    if not pairs:
        raise ValueError(f"{found.name} holds no factors of LoRA in {ADAPTER_WEIGHTS}: give the folder of an adapter.")
    patterns = config.get("alpha_pattern") or {}
    for key, name, other in pairs:
        a, b = weights[key], weights.get(name + other)
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{found.name}: the factors of {name} are no two matrices of one rank.")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{found.name} holds values in {name} that are not finite: train it anew.")
        plain = name.removeprefix("base_model.model.")
        alpha = patterns.get(get_pattern_key(patterns, plain), config.get("lora_alpha", LoraConfig.lora_alpha))
        own = a.shape[0]
        scale = alpha / (math.sqrt(own) if config.get("use_rslora") else own)
        yield Factors(plain, (key, name + other), a, b, scale)


def _nearest_of_rank(module: Factors, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    roots = values[:rank].sqrt()
    missing = rank - len(roots)
    a = (p @ v[:rank].T * roots).T
    b = q @ u[:, :rank] * roots
    return pad(a, (0, 0, 0, missing)), pad(b, (0, missing)), values
