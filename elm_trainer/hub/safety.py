"""What an adapter of a stranger may hold: names of files, JSON, settings and headers are checked before anything is loaded."""

import copy
import dataclasses
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .errors import UnsafeAdapterError, first_line
from .info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT, TOKENIZER_FILES
from .untrusted import (
    LARGEST_NUMBER,
    LARGEST_RANK,
    LONGEST_FILE_NAME,
    MOST_ENTRIES,
    MOST_PATTERNS,
    MOST_STEPS,
    is_plain_name,
    is_revision,
    matching_steps,
    read_header,
    read_json,
    short,
    walk,
)


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "rank": lambda value: type(value) is int and 0 < value <= LARGEST_RANK,
    "number": lambda value: type(value) in (int, float) and -LARGEST_NUMBER < value < LARGEST_NUMBER,
    "name": lambda value: isinstance(value, str),
    "flag": lambda value: isinstance(value, bool),
    "count": lambda value: type(value) is int and 0 <= value < 1 << 31,
    "counts": lambda value: isinstance(value, list) and all(map(_KINDS["count"], value)),
    "revision": is_revision,
}
# What a LoRA adapter is made of: the kind of a value, and its forms. Of a list or a table (by pattern or by module) each entry
# is looked at.
_FIELDS: Mapping[str, tuple[str, str]] = {
    "alpha_pattern": ("number", "table"),
    "base_model_name_or_path": ("name", "one"),
    "ensure_weight_tying": ("flag", "one"),
    "exclude_modules": ("name", "one or list"),
    "fan_in_fan_out": ("flag", "one"),
    "layers_pattern": ("name", "one or list"),
    "layers_to_transform": ("count", "one or list"),
    "lora_alpha": ("number", "one"),
    "lora_bias": ("flag", "one"),
    "lora_dropout": ("number", "one"),
    "modules_to_save": ("name", "list"),
    "r": ("rank", "one"),
    "rank_pattern": ("rank", "table"),
    "revision": ("revision", "one"),
    "target_modules": ("name", "one or list"),
    "target_parameters": ("name", "list"),
    "trainable_token_indices": ("counts", "one or table"),
    "use_dora": ("flag", "one"),
    "use_rslora": ("flag", "one"),
}
# Others of plain LoRA, which are checked by themselves or are of no consequence. PEFT gives everything else to
# importers, initializers that rewrite the base, or variants that route between further adapters.
_PLAIN = {*_FIELDS, "inference_mode", "init_lora_weights", "peft_type", "peft_version", "task_type"}
_WHY = {
    "auto_mapping": 'imports a library by its name (save the adapter with `task_type="CAUSAL_LM"` to be without)',
    "arrow_config": "routes between further adapters",
    "bias": "overwrites biases of the base, which `unload` does not bring back",
    "corda_config": "reads a pickled cache",
    "eva_config": "decomposes activations of data",
    "kasa_config": "truncates weights of the base",
    "layer_replication": "rebuilds the base with more layers",
    "loftq_config": "quantizes weights of the base",
    "lora_ga_config": "reads a pickled cache",
    "megatron_config": "imports a library by its name",
    "megatron_core": "imports a library by its name",
}


def check_adapter_config(config: Any, path: Path) -> None:
    """Refuse an `adapter_config.json` that is more than plain LoRA, naming the field, its value and what it would do.

    Fields that nobody here knows pass, since PEFT leaves them out with a warning.
    """
    if not isinstance(config, dict):
        raise UnsafeAdapterError(f"{path} holds a {type(config).__name__}, not the settings of an adapter.")
    if config.get("peft_type") != "LORA":
        raise UnsafeAdapterError(
            f"{path}: `peft_type` is {short(config.get('peft_type'))}. Only LORA can be checked before it is loaded: load "
            "it with `PeftModel.from_pretrained` if you trust it."
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsafeAdapterError(f"{path}: `task_type` is {short(config['task_type'])}, but CAUSAL_LM is expected.")
    start = config.get("init_lora_weights", True)
    if not (isinstance(start, bool) or start in ("gaussian", "orthogonal")):
        raise UnsafeAdapterError(
            f"{path}: `init_lora_weights` is {short(start)}, which reads or rewrites the base when the adapter is loaded: "
            "save it as plain LoRA, with `path_initial_model_for_weight_conversion` of `save_pretrained`."
        )
    # Fields of the installed PEFT, and those of other versions that are known to be more than plain LoRA.
    defaults = dict.fromkeys(_WHY) | {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for name, default in defaults.items():
        value = config.get(name)
        if name not in _PLAIN and value and value != default:
            why = _WHY.get(name, "is not part of plain LoRA")
            raise UnsafeAdapterError(f"{path}: `{name}` is {short(value)}. It {why}: it is not loaded.")
    for name, (kind, forms) in _FIELDS.items():
        value = config.get(name)
        if value is not None and not _fits(value, _KINDS[kind], forms):
            raise UnsafeAdapterError(f"{path}: `{name}` is {short(value)}, which PEFT does not take.")
        if "list" in forms and isinstance(value, list) and len(value) > MOST_ENTRIES:
            raise UnsafeAdapterError(
                f"{path}: `{name}` has {len(value)} entries, more than {MOST_ENTRIES}: do not load it."
            )
    _check_patterns(config, path)


def _check_patterns(config: Mapping[str, Any], path: Path) -> None:
    """Check what PEFT compiles as regular expressions."""
    for name in ("modules_to_save", "layers_pattern"):
        values = [config[name]] if isinstance(config.get(name), str) else config.get(name) or ()
        for value in filter(None, values):
            if not is_plain_name(value):
                raise UnsafeAdapterError(
                    f"{path}: `{name}` is {short(value)}, but only plain names of modules are taken from others."
                )
    # Field, pattern, and how many `.*` PEFT puts in front of it.
    by_module = [
        (name, pattern, 1) for name in ("rank_pattern", "alpha_pattern") for pattern in config.get(name) or ()
    ]
    if len(by_module) > MOST_PATTERNS:
        raise UnsafeAdapterError(
            f"{path}: `rank_pattern` and `alpha_pattern` have {len(by_module)} entries, more than {MOST_PATTERNS}: do not "
            "load it."
        )
    targets = [(name, config.get(name), 0) for name in ("target_modules", "exclude_modules")]
    steps = 0
    for name, pattern, before in targets + by_module:
        if not isinstance(pattern, str):  # a list of names
            continue
        try:
            steps += matching_steps(pattern, before)
            if steps > MOST_STEPS:
                raise ValueError("it has too many parts that take any text")
        except ValueError as error:
            raise UnsafeAdapterError(
                f"{path}: `{name}` is {short(pattern)}, a pattern that might take for ever to match, as {error}. Name "
                "the modules in a list, or use a simpler one, such as '.*\\.(q_proj|v_proj)'."
            ) from error


def _fits(value: Any, is_one: Callable[[Any], bool], forms: str) -> bool:
    if "table" in forms and isinstance(value, dict):
        return all(map(is_one, value.values()))
    if "list" in forms and isinstance(value, list):
        return all(map(is_one, value))
    return "one" in forms and is_one(value)


def add_tokens(path: Path, config: Mapping[str, Any], base: PreTrainedModel, tokens: int) -> bool:
    """Give the base rows for tokens that were added to the tokenizer, where the adapter's file holds whole embeddings for them.

    PEFT saves the embeddings along where they were resized. Of the tokens that the base has they must say nothing new.

    Args:
        path: `adapter_model.safetensors`.
        config: Checked contents of `adapter_config.json`.
        tokens: How many the adapter's tokenizer has.

    Returns:
        `bool`: whether the file holds such embeddings.
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

    What an adapter has is asked of PEFT itself, on a copy of the base that has shapes but no weights. With `embeddings` they
    are saved along (see [`add_tokens`]).
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


# All that is ever fetched from a repository: an adapter of somebody else may ship any format of tokenizers.
LOADED_FILES = (
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, REPORT, *TOKENIZER_FILES, "added_tokens.json", "merges.txt",
    "special_tokens_map.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip
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

    A pickle is refused even beside safetensors: other tools may read it, and nothing that this package publishes is one. With
    `left_by_training` those pass that training leaves beside an adapter, such as `training_args.bin`: nothing here reads them.
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
    """Contents of `adapter_config.json` in a folder whose names, JSON and header of weights are checked; nothing is loaded.

    It may be a snapshot in the cache of huggingface_hub. For `left_by_training` see [`check_names`].
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
