"""What a repository, a folder and a safetensors file may hold: checked by names, JSON and headers before anything is loaded."""

import copy
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .adapter_config import check_adapter_config
from .errors import UnsafeAdapterError, first_line
from .info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT, TOKENIZER_FILES
from .untrusted import LONGEST_FILE_NAME, LONGEST_TENSOR_NAME, MOST_HEADER_BYTES, parse_json, read_json, short, walk


_DTYPES = ("F32", "F16", "BF16")


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Read and check the header of a safetensors file.

    safetensors itself refuses tensors that overlap, leave gaps, do not fill the file or have other bytes than their shape.

    Returns:
        `dict`: the shape of each tensor.

    Raises:
        UnsafeAdapterError: if it is longer than the file or 10 MB, holds a key twice, cannot be read, or a tensor has
            an unexpected type.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UnsafeAdapterError(f"{path}: the header says it has {length} bytes, but the file has {size}.")
        if length > MOST_HEADER_BYTES:
            raise UnsafeAdapterError(f"{path}: the header has {length} bytes, more than {MOST_HEADER_BYTES}.")
        raw = file.read(length)
    try:
        for name, entry in parse_json(raw).items():
            if len(name) > LONGEST_TENSOR_NAME:
                raise UnsafeAdapterError(f"{path}: a tensor has a name of {len(name)} characters: do not load it.")
            dtype = entry.get("dtype") if name != "__metadata__" else None
            if isinstance(dtype, str) and dtype not in _DTYPES:
                raise UnsafeAdapterError(
                    f"{path}: tensor {name!r} is of the type {short(dtype)}, but adapters are {', '.join(_DTYPES)}."
                )
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (ValueError, AttributeError, SafetensorError) as error:
        raise UnsafeAdapterError(f"{path}: the header cannot be read ({error}): the file is broken.") from error


def add_tokens(path: Path, config: Mapping[str, Any], base: PreTrainedModel, tokens: int) -> bool:
    """Give the base rows for tokens that were added to the tokenizer, where the adapter's file holds whole embeddings for them.

    PEFT saves the embeddings along where they were resized. Of the tokens that the base has they must say nothing new.

    Args:
        path: `adapter_model.safetensors`, whose header was checked.
        config: Checked contents of `adapter_config.json`.
        base: Base model, whose embeddings are resized.
        tokens: Tokens of the adapter's tokenizer.

    Returns:
        `bool`: whether the file holds such embeddings.

    Raises:
        UnsafeAdapterError: if they change what the base has.
    """
    given, head = base.get_input_embeddings(), base.get_output_embeddings()
    rows, width = given.weight.shape
    places = {f"base_model.model.{name}.": m for name, m in base.named_modules() if m is given or m is head}
    found = read_header(path)
    whole = {
        name: module
        for name, shape in found.items()
        for place, module in places.items()
        if name.startswith(place) and len(shape) == 2 and shape[0] >= tokens and shape[1] == width
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
    base.resize_token_embeddings(max(found[name][0] for name in whole), mean_resizing=False)
    return True


def holds_embeddings(path: Path, base: PreTrainedModel) -> bool:
    """Whether a file holds whole embeddings, as PEFT saves them along where tokens were added."""
    given = base.get_input_embeddings()
    places = tuple(f"base_model.model.{name}." for name, module in base.named_modules() if module is given)
    shape = tuple(given.weight.shape)
    return any(name.startswith(places) and found == shape for name, found in read_header(path).items())


def check_tensors(path: Path, config: Mapping[str, Any], base: PreTrainedModel, *, embeddings: bool = False) -> None:
    """Check that the tensors of a file are those that an adapter of this configuration has on this base, all finite.

    What an adapter has is asked of PEFT itself, on a copy of the base that has shapes but no weights.

    Args:
        path: `adapter_model.safetensors`, whose header was checked.
        config: Checked contents of `adapter_config.json`.
        embeddings: Whether its embeddings are saved along (see [`add_tokens`]).

    Raises:
        UnsafeAdapterError: naming the tensor, with the shape found and the one expected.
    """
    found = read_header(path)
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
                f"{path}: tensor {name!r} has the shape {short(list(shape))}, but {list(expected[name])} fits the base and "
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


# Those that an adapter of somebody else may ship, in any format of tokenizers.
_TOKENIZER_FILES = (
    *TOKENIZER_FILES,
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
# All that is ever fetched from a repository.
LOADED_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT, *_TOKENIZER_FILES)

_PICKLES = frozenset(
    (".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".h5", ".msgpack", ".tar")
)
_CODE = frozenset((".py", ".pyc", ".pyd", ".pyo", ".pyx", ".so", ".dll", ".dylib", ".sh", ".bat", ".exe"))
# A Trainer, DeepSpeed and FSDP leave these beside the adapter that is saved. Nothing reads them on loading.
_LEFT_BY_TRAINING = re.compile(
    r"training_args\.bin|optimizer(_\d+)?\.(bin|pt)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|zero_to_fp32\.py|"
    r"pytorch_model_fsdp(_\d+)?\.bin|((bf16|fp16)_)?zero_pp_rank_\d+_mp_rank_\d+_(optim|model)_states\.pt|"
    r"mp_rank_\d+_model_states\.pt"
)
# Nothing of these is a setting, and vocabularies are large.
PLAIN_DATA = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "vocab.txt")


def check_names(names: Iterable[str], where: str, *, left_by_training: bool = False) -> None:
    """Refuse names that lead out of the folder, and files that could run code when read.

    A pickle is refused even beside safetensors: other tools may read it, and nothing that this package publishes is one.

    Args:
        names: Paths in the repository or folder.
        where: Repository or folder, for the error.
        left_by_training: Whether to overlook `training_args.bin` and what else training leaves beside an adapter,
            which nothing here reads.

    Raises:
        UnsafeAdapterError: naming the file and what is wrong with it.
    """
    for name in names:
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if reason := _leads_out(name):
            raise UnsafeAdapterError(f"{where} holds a file named {name[:300]!r}, which {reason}: do not load it.")
        if left_by_training and _LEFT_BY_TRAINING.fullmatch(path.name):
            continue
        if suffix in _PICKLES:
            raise UnsafeAdapterError(
                f"{where} holds {name}: a file of the type {suffix} may run code when it is read. Ask its author to "
                "publish safetensors alone."
            )
        if suffix in _CODE:
            raise UnsafeAdapterError(f"{where} holds {name}: an adapter needs no code. Do not load it.")


def check_folder(folder: Path, *, left_by_training: bool = False) -> dict[str, Any]:
    """Check a folder with an adapter, reading its JSON and the header of its weights, but loading nothing.

    Args:
        folder: Folder, which may be a snapshot in the cache of huggingface_hub.
        left_by_training: See [`check_names`].

    Returns:
        `dict`: the contents of `adapter_config.json`.

    Raises:
        UnsafeAdapterError: naming the file and what is wrong with it.
    """
    names = list(_walk(folder))
    check_names(names, str(folder), left_by_training=left_by_training)
    for needed in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if needed not in names:
            # PEFT saves an adapter that is not called "default" in a folder of its name.
            deeper = sorted(name.removesuffix(f"/{needed}") for name in names if name.endswith(f"/{needed}"))
            hint = f"name the one in it, {folder / deeper[0]}" if deeper else "it is not the folder of an adapter"
            raise UnsafeAdapterError(f"{folder} holds no {needed}: {hint}.")
    for name in names:
        if name.lower().endswith(".json") and "/" not in name and name not in PLAIN_DATA:
            if any(key == "auto_map" for key, _, _ in walk(read_json(folder / name))):
                raise UnsafeAdapterError(f"{folder / name} holds `auto_map`, which names code to run: do not load it.")
    config = read_json(folder / ADAPTER_CONFIG)
    check_adapter_config(config, folder / ADAPTER_CONFIG)
    read_header(folder / ADAPTER_WEIGHTS)
    return config


def _leads_out(name: str) -> str | None:
    if any(ord(character) < 32 for character in name):
        return "holds control characters"
    if "\\" in name:
        return "holds a backslash, a separator on Windows"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    if {"", ".", ".."} & set(name.split("/")):
        return "leads out of its folder"
    if max(map(len, name.encode("utf-8", "surrogatepass").split(b"/"))) > LONGEST_FILE_NAME:
        return f"is longer than {LONGEST_FILE_NAME} bytes"
    return None


def _walk(folder: Path) -> Iterator[str]:
    """Names of all files, with links that lead out of the folder refused."""
    root = folder.resolve()
    for place, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(place) / name
            relative = path.relative_to(root).as_posix()
            if path.is_symlink() and not _stays(path, root):
                raise UnsafeAdapterError(f"{folder} holds {relative}, a link to {os.readlink(path)} outside of it.")
            if name in folders:
                continue
            if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
                raise UnsafeAdapterError(f"{folder} holds {relative}, which is not a plain file.")
            yield relative


def _stays(link: Path, root: Path) -> bool:
    if link.resolve().is_relative_to(root):
        return True
    # A snapshot of the Hub's cache is made of links into the blobs beside it, which may be links into a store.
    target = Path(os.path.normpath(link.parent / os.readlink(link)))
    return root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
