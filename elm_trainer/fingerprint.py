"""Hashes of weights: a cheap one of a base's samples, sums over every bit, and SHA-256 of all bytes."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


# Values that are read of each tensor. Other weights differ nearly everywhere, so few of them tell.
SAMPLES = 64


def base_fingerprint(model: PreTrainedModel | PeftModel, rows: int | None = None) -> dict[str, str]:
    """SHA-256 over names, shapes and evenly spaced samples of the base model's tensors.

    It is the same with and without an adapter, and with weights loaded as bfloat16 or float32, since the samples are
    rounded to bfloat16 before they are hashed. Weights loaded as float16 give the same only where float16 holds them
    exactly, as it does values of bfloat16 from 6e-5 to 65504: others are rounded twice. Of embeddings and head only the first
    `rows` count, where the model has further ones for tokens that were added.

    Returns:
        `dict[str, str]`: `"weights"` over all tensors, and `"unquantized"` over embeddings, output head, norms and
        biases, which quantization leaves as they are. A quantized model has no `"weights"`.

    Raises:
        ValueError: if weights were offloaded, and are not there to be read.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings()
    kept = {id(tensor) for tensor in head.parameters()} if head is not None else set()
    quantized = is_quantized(base)
    tokens = base.get_input_embeddings().weight.shape[0]
    found: list[tuple[str, bool, torch.Tensor]] = []
    for name, module, tensor in _base_tensors(base):
        is_small = tensor.dim() < 2 and name.rpartition(".")[2] in ("weight", "bias")
        stays = is_small or isinstance(module, nn.Embedding) or id(tensor) in kept
        if quantized and not stays:
            continue
        if (isinstance(module, nn.Embedding) or id(tensor) in kept) and tensor.shape[0] == tokens:
            tensor = tensor[:rows]
        if tensor.device.type == "meta":
            raise ValueError(
                f"`{name}` was offloaded to disk or to the processor, and cannot be read for the fingerprint: load the "
                "model with a `device_map` that keeps its weights on devices."
            )
        found.append((f"{name} {tuple(tensor.shape)}", stays, _samples(tensor)))
    samples = [sample for _, _, sample in found]
    together = torch.cat([sample.to(samples[0].device) for sample in samples]).cpu()  # one copy to the host
    values = torch.split(together, [len(sample) for sample in samples])
    digests = {"unquantized": hashlib.sha256()} | ({} if quantized else {"weights": hashlib.sha256()})
    # The sorted names make the order of modules irrelevant, which some adapters change.
    for (name, stays, _), sample in sorted(zip(found, values, strict=True), key=lambda row: row[0][0]):
        for kind, digest in digests.items():
            if stays or kind == "weights":
                digest.update(name.encode())
                digest.update(sample.view(torch.uint8).numpy().data)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def bit_sums(model: PreTrainedModel | PeftModel) -> str:
    """SHA-256 over one sum for each of the base model's tensors, of its memory read as integers of 8 bytes.

    It tells apart what the samples of [`base_fingerprint`] miss, such as a few changed embeddings. Integer sums are the
    same on every device and in any order, and cost one pass over the memory. Unlike the samples they depend on the type
    in which the weights were loaded.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    sums = {name: _bit_sum(tensor) for name, _, tensor in _base_tensors(base)}
    return hashlib.sha256(repr([(name, sums[name].item()) for name in sorted(sums)]).encode()).hexdigest()


def is_quantized(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model's weights are stored in fewer bits than they compute with."""
    return "quantization_config" in model.config.to_dict()


def _base_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Parameters with the names that they have without an adapter, tied ones under each of their names."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _base_tensors(module.original_module, prefix)
        return
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        with _whole(parameter):
            yield prefix + name, module, parameter
    for name, child in module.named_children():
        yield from _base_tensors(child, f"{prefix}{name}.")


def _whole(parameter: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which a parameter that DeepSpeed ZeRO-3 has split over processes is whole.

    PEFT's `gather_params_ctx` asks whether ZeRO-3 is on; weights stay split after that, and would be hashed as empty.
    """
    # DeepSpeed marks such a parameter by this attribute.
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    """Evenly spaced values from first to last, `[at most SAMPLES]`, without a copy of the tensor."""
    count = tensor.numel()
    if count == 0 or tensor.dim() == 0:
        return tensor.detach().reshape(count).to(torch.bfloat16)
    steps = min(SAMPLES, count)
    places = torch.tensor([index * (count - 1) // max(steps - 1, 1) for index in range(steps)], device=tensor.device)
    return tensor.detach()[torch.unravel_index(places, tensor.shape)].to(torch.bfloat16)


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's memory, read as words of 8 bytes, modulo 2^64."""
    flat = tensor.detach().reshape(-1)
    if flat.stride(0) != 1 or flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone(memory_format=torch.contiguous_format)
    memory = flat.view(torch.uint8)
    whole = memory.numel() // 8 * 8
    return memory[:whole].view(torch.int64).sum() + memory[whole:].sum(dtype=torch.int64)


def model_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of the weights, the same with and without an adapter."""
    weights = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            weights[name.replace("base_model.model.", "").replace(".base_layer", "")] = parameter
    return adapter_fingerprint(weights)


def adapter_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """The same over an adapter's tensors, named as in its file: a report's `erased_sha256`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        # One at a time: the weights of all shards need not fit on one device together.
        with _whole(tensors[name]):
            tensor = tensors[name].detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            # A copy: what NumPy has seen can no longer be freed, and FSDP frees what it has gathered.
            copied = tensor.to("cpu", copy=True)
            digest.update(copied.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
