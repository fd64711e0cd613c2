"""What a repository or folder may hold: checked by names and JSON before anything of it is loaded."""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .adapter_config import check_adapter_config
from .errors import UnsafeAdapterError
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, REPORT, TOKENIZER_FILES
from .info import INFO_FILE
from .tensors import read_header
from .untrusted_json import holds_key, read_json


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
_LONGEST_NAME = 255  # of a file, on most systems


def check_names(names: Iterable[str], where: str, *, left_by_training: bool = False) -> None:
    """Refuse names that lead out of the folder, and files that could run code when read.

    A pickle is refused even beside safetensors: other tools may read it, and nothing that this package publishes is one.

    Args:
        names (`Iterable[str]`): Paths in the repository or folder.
        where (`str`): Repository or folder, for the error.
        left_by_training (`bool`, *optional*, defaults to `False`): Whether to overlook `training_args.bin` and what else
            training leaves beside an adapter, which nothing here reads.

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
        folder (`Path`): Folder, which may be a snapshot in the cache of huggingface_hub.
        left_by_training (`bool`, *optional*, defaults to `False`): See [`check_names`].

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
            if holds_key(read_json(folder / name), "auto_map"):
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
    if max(map(len, name.encode("utf-8", "surrogatepass").split(b"/"))) > _LONGEST_NAME:
        return f"is longer than {_LONGEST_NAME} bytes"
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
