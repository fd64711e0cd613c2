"""An adapter for other programs: `export_gguf_adapter` and `export_gguf` for llama.cpp, `merge_erased` as full weights."""

import copy
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, Keys
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..files import replacing
from ..fingerprint import is_quantized
from ..modeling import load_config, locate, reading_gguf_once
from .adapter import Access, FoundAdapter, find_adapter
from .combine import FACTORS, Factors, adapter_factors, empty_folder
from .info import ADAPTER_WEIGHTS
from .load import named_base


# Families whose tensors are known to lie in GGUF as they are read here. Others may be stored otherwise than they are
# trained, and an adapter on them would be wrong without a word.
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA}
TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}


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
        revision (`str`, *optional*): Commit, tag or branch of the adapter's repository.
        token (`str`, *optional*): Token for the Hub, where the one of `hf auth login` is not meant.
        cache_dir (`str` or `Path`, *optional*), local_files_only (`bool`, *optional*, defaults to `False`):
            See [`load_erased`].

    Returns:
        `Path`: the file.

    Raises:
        FileExistsError: if the file exists.
        ValueError: if the base's family is not in `ARCHITECTURES`, the adapter holds more than factors of linear
            modules in layers, as embeddings and whole modules, or `dtype` is unknown.
        UnsafeAdapterError, HubError: see [`load_erased`].
    """
    output, kind = _check(output_file, dtype)
    found = find_adapter(adapter, revision, Access(token, cache_dir, local_files_only))
    name = base_model or named_base(found)
    own = found.info.base_model if base_model is None and found.info else None
    config = load_config(
        name,
        revision=own.revision if own else None,
        gguf_file=own.gguf_file if own else None,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    modules = dict(_gguf_modules(found, config, name))
    # One alpha is all that the file holds; what a module's own rank and scale differ from it goes into its B.
    first = next(iter(modules.values()))
    alpha = first.scale * first.a.shape[0]
    with replacing(output) as unfinished:
        writer = GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for name, module in modules.items():
            b = module.b.double().numpy() * (module.scale * module.a.shape[0] / alpha)
            for factor, values in (("lora_a", module.a.float().numpy()), ("lora_b", _reordered(name, b, config))):
                _add(writer, f"{name}.{factor}", values, kind)
        _write(writer)
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
        revision (`str`, *optional*): See [`export_gguf_adapter`], as the next three.
        token (`str`, *optional*): Token for the Hub.
        cache_dir (`str` or `Path`, *optional*): Cache of huggingface_hub.
        local_files_only (`bool`, *optional*, defaults to `False`): Whether to load from the cache alone.

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
    base = _gguf_of(found) if base_file is None else Path(base_file)
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
    with replacing(output) as unfinished:
        writer = GGUFWriter(unfinished, reader.fields[Keys.General.ARCHITECTURE].contents())
        _copy_metadata(reader, writer)
        for name, tensor in tensors.items():
            if name not in modules:
                writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
                continue
            module = modules[name]
            update = module.scale * module.b.double().numpy() @ module.a.double().numpy()
            values = gguf.dequantize(tensor.data, tensor.tensor_type) + _reordered(name, update, config)
            _add(writer, name, values, kind)
        _write(writer)
    return output


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


def _check(output_file: str | Path, dtype: str) -> tuple[Path, GGMLQuantizationType]:
    if dtype not in TYPES:
        raise ValueError(f"`dtype` is {dtype!r}: use {', '.join(TYPES)}.")
    output = Path(output_file)
    if output.exists():
        raise FileExistsError(f"`output_file` {output} exists: name another one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output, TYPES[dtype]


def _gguf_of(found: FoundAdapter) -> Path:
    """The GGUF file on which an adapter was trained."""
    name = named_base(found)
    place, file = locate(name, None)
    if file is None:
        raise ValueError(
            f"`base_file` is None, but {found.name} was trained on {name}, which is no GGUF file here: give one of the same "
            "model."
        )
    return Path(place) / file


def _gguf_modules(found: FoundAdapter, config: PreTrainedConfig, base: str) -> Iterator[tuple[str, Factors]]:
    """The update of each module by the name of the tensor that it changes, in a base of this name."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"`base_model` {base} is of the family {config.model_type!r}, but GGUF files are written for "
            f"{', '.join(ARCHITECTURES)} alone: `merge_erased`, and llama.cpp's convert_hf_to_gguf.py on its folder."
        )
    weights = load_file(found.folder / ADAPTER_WEIGHTS)
    linear = list(adapter_factors(found, weights))
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


def _copy_metadata(reader: gguf.GGUFReader, writer: GGUFWriter) -> None:
    for field in reader.fields.values():
        # The writer writes these itself.
        if field.name != Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            kind = field.types[0]
            sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type)


def _add(writer: GGUFWriter, name: str, values: np.ndarray, kind: GGMLQuantizationType) -> None:
    values = np.ascontiguousarray(values, dtype=np.float32)
    # Rows that cannot be cut into whole blocks keep their numbers.
    if kind == GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
        kind = GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def _write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
