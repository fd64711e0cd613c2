"""A cheap hash of a base model's weights, and the check that an adapter meets the weights it was trained on."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .errors import BaseMismatchError


logger = logging.get_logger(__name__)
# Values that are read of each tensor. Other weights differ nearly everywhere, so few of them tell.
SAMPLES = 64


def base_fingerprint(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """SHA-256 over names, shapes and evenly spaced samples of the base model's tensors.

    It is the same with and without an adapter, and with weights loaded as bfloat16 or float32, since the samples are
    rounded to bfloat16 before they are hashed. Weights loaded as float16 give the same only where float16 holds them
    exactly, as it does values of bfloat16 from 6e-5 to 65504: others are rounded twice.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): The base, or an adapter on it.

    Returns:
        `dict[str, str]`: `"weights"` over all tensors, and `"unquantized"` over embeddings, output head, norms and
        biases, which quantisation leaves as they are. A quantised model has no `"weights"`.

    Raises:
        ValueError: if weights were offloaded, and are not there to be read.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings()
    kept = {id(tensor) for tensor in head.parameters()} if head is not None else set()
    quantised = is_quantised(base)
    names: list[str] = []
    samples: list[torch.Tensor] = []
    left_alone: list[bool] = []
    for name, module, tensor in _base_tensors(base):
        is_small = tensor.dim() < 2 and name.rpartition(".")[2] in ("weight", "bias")
        stays = is_small or isinstance(module, nn.Embedding) or id(tensor) in kept
        if quantised and not stays:
            continue
        if tensor.device.type == "meta":
            raise ValueError(
                f"`{name}` was offloaded to disk or to the processor, and cannot be read for the fingerprint: load the "
                "model with a `device_map` that keeps its weights on devices, or `allow_mismatch=True`."
            )
        names.append(f"{name} {tuple(tensor.shape)}")
        samples.append(_samples(tensor))
        left_alone.append(stays)
    sizes = [len(sample) for sample in samples]
    together = torch.cat([sample.to(samples[0].device) for sample in samples]).cpu()  # one copy to the host
    # The sorted names make the order of modules irrelevant, which some adapters change.
    rows = sorted(zip(names, left_alone, torch.split(together, sizes), strict=True), key=lambda row: row[0])
    found = {"unquantized": _digest([(name, values) for name, unquantized, values in rows if unquantized])}
    if not quantised:
        found["weights"] = _digest([(name, values) for name, _, values in rows])
    return found


def check_base(model: PreTrainedModel | PeftModel, expected: Mapping[str, str], base_id: str) -> None:
    """Check that a model has the weights that a fingerprint was taken of.

    A quantised model is compared by the tensors that quantisation leaves alone, and the log says so.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): Model at hand.
        expected (`Mapping[str, str]`): What [`base_fingerprint`] said of the base.
        base_id (`str`): Hub id of that base, for the error.

    Raises:
        BaseMismatchError: if the weights are others.
    """
    found = base_fingerprint(model)
    compared = "weights" if {"weights"} <= found.keys() & expected.keys() else "unquantized"
    if compared == "unquantized":
        logger.warning(
            f"The base or the one the adapter was trained on is quantised: only its embeddings, norms and biases were "
            f"compared with {base_id}."
        )
    wanted = expected.get(compared)
    if found[compared] == wanted:
        return
    what = "weights"
    if compared == "unquantized" or found["unquantized"] != expected.get("unquantized"):
        what = "embeddings, norms or biases"
    raise BaseMismatchError(
        f"The base model is not {base_id}, which the adapter was trained on: the {what} differ (fingerprint "
        f"`{compared}` is {found[compared][:12]}…, but {str(wanted)[:12]}… is expected). Load that model and revision, "
        "or pass `allow_mismatch=True` to go on with an adapter that nobody measured on this base."
    )


def is_quantised(model: PreTrainedModel | PeftModel) -> bool:
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
        yield prefix + name, module, parameter
    for name, child in module.named_children():
        yield from _base_tensors(child, f"{prefix}{name}.")


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    """Evenly spaced values from first to last, `[at most SAMPLES]`, without a copy of the tensor."""
    count = tensor.numel()
    if count == 0 or tensor.dim() == 0:
        return tensor.detach().reshape(count).to(torch.bfloat16)
    steps = min(SAMPLES, count)
    places = torch.tensor([index * (count - 1) // max(steps - 1, 1) for index in range(steps)], device=tensor.device)
    return tensor.detach()[torch.unravel_index(places, tensor.shape)].to(torch.bfloat16)


def _digest(rows: list[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, values in rows:
        digest.update(name.encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
