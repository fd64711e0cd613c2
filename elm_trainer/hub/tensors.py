"""The adapter's safetensors file: its header, and whether its tensors fit the base, before PEFT reads any of them."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .errors import UnsafeAdapterError
from .failures import first_line
from .untrusted_json import parse_json


_MOST_HEADER_BYTES = 10_000_000
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 1_000
_LARGEST_NUMBER = 1 << 63
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Entry:
    """A tensor in the header of a safetensors file.

    Args:
        dtype (`str`): Its type as safetensors names it.
        shape (`tuple[int, ...]`): Its shape.
        start (`int`): First byte, counted from the end of the header.
        end (`int`): Byte after the last one.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check the header of a safetensors file.

    Raises:
        UnsafeAdapterError: if it is longer than the file or 10 MB, is no JSON, or its tensors have an unexpected type,
            overlap, leave gaps or do not fill the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UnsafeAdapterError(f"{path}: the header says it has {length} bytes, but the file has {size}.")
        if length > _MOST_HEADER_BYTES:
            raise UnsafeAdapterError(f"{path}: the header has {length} bytes, more than {_MOST_HEADER_BYTES}.")
        raw = file.read(length)
    try:
        content = parse_json(raw)
        content.pop("__metadata__", None)
        entries = {name: _entry(value) for name, value in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsafeAdapterError(f"{path}: the header cannot be read ({error}): the file is broken.") from error
    if long := next((name for name in entries if len(name) > _LONGEST_NAME), None):
        raise UnsafeAdapterError(f"{path}: a tensor has a name of {len(long)} characters: do not load it.")
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.dtype not in _SIZES:
            raise UnsafeAdapterError(
                f"{path}: tensor {name!r} is of the type {entry.dtype!r}, but adapters are {', '.join(_SIZES)}."
            )
        if entry.start != place:
            fault = "overlaps" if entry.start < place else "leaves a gap behind"
            raise UnsafeAdapterError(
                f"{path}: tensor {name!r} starts at byte {entry.start} and {fault} the one before."
            )
        if entry.end - entry.start != math.prod(entry.shape) * _SIZES[entry.dtype]:
            raise UnsafeAdapterError(
                f"{path}: tensor {name!r} of the shape {list(entry.shape)} has {entry.end - entry.start} bytes."
            )
        place = entry.end
    if place != size - 8 - length:
        raise UnsafeAdapterError(
            f"{path}: the tensors end at byte {place}, but {size - 8 - length} follow the header."
        )
    return entries


def add_tokens(path: Path, config: Mapping[str, Any], base: PreTrainedModel, tokens: int) -> bool:
    """Give the base rows for tokens that were added to the tokenizer, where the adapter's file holds whole embeddings for them.

    PEFT saves the embeddings along where they were resized. Of the tokens that the base has they must say nothing new.

    Args:
        path (`Path`): `adapter_model.safetensors`, whose header was checked.
        config (`Mapping`): Checked contents of `adapter_config.json`.
        base ([`~transformers.PreTrainedModel`]): Base model, whose embeddings are resized.
        tokens (`int`): Tokens of the adapter's tokenizer.

    Returns:
        `bool`: whether the file holds such embeddings.

    Raises:
        UnsafeAdapterError: if they change what the base has.
    """
    given, head = base.get_input_embeddings(), base.get_output_embeddings()
    rows, width = given.weight.shape
    places = {f"base_model.model.{name}.": m for name, m in base.named_modules() if m is given or m is head}
    whole = {
        name: module
        for name, entry in read_header(path).items()
        for place, module in places.items()
        if name.startswith(place) and len(entry.shape) == 2 and entry.shape[0] >= tokens and entry.shape[1] == width
    }
    if not whole:
        return False
    trained = tuple(f".{name}.weight" for name in config.get("modules_to_save") or ())
    with safe_open(path, framework="pt") as file:
        for name, module in whole.items():
            if name.endswith((*trained, ".modules_to_save.weight")):
                continue  # of the adapter's own, whatever it holds
            same = file.get_tensor(name)[:rows].to(module.weight.dtype)
            if not torch.equal(same, module.weight.detach().cpu()):
                raise UnsafeAdapterError(
                    f"{path}: tensor {name!r} changes rows of tokens that the base has: do not load it."
                )
        size = max(file.get_slice(name).get_shape()[0] for name in whole)
    base.resize_token_embeddings(size, mean_resizing=False)
    return True


def check_tensors(path: Path, config: Mapping[str, Any], base: PreTrainedModel, *, embeddings: bool = False) -> None:
    """Check that the tensors of a file are those that an adapter of this configuration has on this base, all finite.

    What an adapter has is asked of PEFT itself, on a copy of the base that has shapes but no weights.

    Args:
        path (`Path`): `adapter_model.safetensors`, whose header was checked.
        config (`Mapping`): Checked contents of `adapter_config.json`.
        base ([`~transformers.PreTrainedModel`]): Base model.
        embeddings (`bool`, *optional*, defaults to `False`): Whether its embeddings are saved along (see [`add_tokens`]).

    Raises:
        UnsafeAdapterError: naming the tensor, with the shape found and the one expected.
    """
    found = {name: entry.shape for name, entry in read_header(path).items()}
    expected = _expected_shapes(path, config, base, embeddings)
    for name, shape in found.items():
        if name not in expected:
            raise UnsafeAdapterError(
                f"{path}: tensor {name!r} is no weight of the configured adapter, so it would overwrite the base or be "
                "ignored. Was the adapter made for another model? Where embeddings were saved along, save it with "
                "`save_embedding_layers=False`."
            )
        if shape != expected[name]:
            raise UnsafeAdapterError(
                f"{path}: tensor {name!r} has the shape {list(shape)}, but {list(expected[name])} fits the base and "
                "`adapter_config.json`. Was the adapter made for another model?"
            )
    if missing := sorted(expected.keys() - found.keys()):
        raise UnsafeAdapterError(
            f"{path}: {len(missing)} tensors of the configured adapter are missing, such as {missing[0]!r}."
        )
    try:
        with safe_open(path, framework="pt") as file:
            for name in found:
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise UnsafeAdapterError(f"{path}: tensor {name!r} holds NaN or infinity.")
    except SafetensorError as error:
        raise UnsafeAdapterError(f"{path} cannot be read ({error}): the file is broken.") from error


def _expected_shapes(
    path: Path, config: Mapping[str, Any], base: PreTrainedModel, embeddings: bool
) -> dict[str, tuple[int, ...]]:
    model_config = copy.deepcopy(base.config)
    if "quantization_config" in model_config.to_dict():
        del model_config.quantization_config
    try:
        with torch.device("meta"):
            bare = type(base)(model_config)
            lora: Any = LoraConfig.from_peft_type(**{**config, "init_lora_weights": True})
            adapter = get_peft_model(bare, lora)
        state = get_peft_model_state_dict(adapter, save_embedding_layers=embeddings)
    except Exception as error:  # whatever PEFT, or the base that it works on, makes of a stranger's settings
        raise UnsafeAdapterError(
            f"{path.parent}: PEFT makes no adapter of `adapter_config.json` on this base ({first_line(error)}). Was it "
            "made for another model?"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _entry(value: Any) -> Entry:
    start, end = value["data_offsets"]
    shape = tuple(value["shape"])
    numbers = (start, end, *shape)
    if (
        len(shape) > _MOST_DIMENSIONS
        or not all(type(number) is int and 0 <= number < _LARGEST_NUMBER for number in numbers)
        or start > end
        or not isinstance(value["dtype"], str)
    ):
        raise ValueError(f"{str(value)[:200]} is no tensor")
    return Entry(value["dtype"], shape, start, end)
