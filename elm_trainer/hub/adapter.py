"""Fetch what a stranger made, an adapter or the config of a base, and check it before transformers acts on it; try a tokenizer."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file, logging

from ..files import file_sha256
from ..modeling import PACKAGED_MODELS
from .errors import HubError, UnsafeAdapterError, UploadError, first_line, named_errors, retried
from .info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, ErasureInfo
from .safety import LOADED_FILES, PLAIN_DATA, check_folder, check_names
from .untrusted import (
    MOST_BASE_STEPS,
    MOST_DATA_BYTES,
    MOST_JSON_BYTES,
    MOST_PARTS,
    TEMPLATE_BYTES,
    TEMPLATE_CHARACTERS,
    TEMPLATE_SECONDS,
    is_plain_name,
    matching_steps,
    read_json,
    short,
    walk,
)


logger = logging.get_logger(__name__)
# What transformers reads of a base beside its weights and what an adapter may ship too.
_BASE_FILES = ("config.json", "generation_config.json", "chat_template.json", "processor_config.json")


@dataclass(frozen=True)
class Access:
    """How to reach the Hub; see [`load_erased`]."""

    token: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


def _fetch(repo_id: str, revision: str | None, access: Access) -> Path:
    """Snapshot of a repository. What it lists is checked before any of it is downloaded."""
    offline = access.local_files_only or constants.HF_HUB_OFFLINE
    options = vars(access) | {"revision": revision, "local_files_only": offline}
    try:
        with named_errors(repo_id, f"Loading {repo_id}"):
            if offline:
                return Path(snapshot_download(repo_id, allow_patterns=[*LOADED_FILES], **options))
            info = _describe(repo_id, revision, access)
            names = [file.rfilename for file in info.siblings or ()]
            check_names(names, repo_id)
            _check_sizes(info, repo_id)
            if ADAPTER_CONFIG not in names:
                raise HubError(f"{repo_id} holds no {ADAPTER_CONFIG}: it is not the repository of an adapter.")
            wanted = [name for name in LOADED_FILES if name in names]
            folder = Path(retried(lambda: snapshot_download(repo_id, allow_patterns=wanted, **options)))
            if folder.name != info.sha:
                raise HubError(
                    f"{repo_id} was changed while it was loaded: load it again, or name a commit as `revision`."
                )
            return folder
    except UploadError as error:
        raise HubError(
            f"{repo_id} could not be fetched, since the Hub can't be reached ({first_line(error.__cause__ or error)}): try "
            "again, or pass `local_files_only=True` to load a copy from the cache."
        ) from error
    except HubError:
        raise
    except HFValidationError as error:
        raise HubError(
            f"{repo_id[:100]} is no folder here, and no id on the Hub either ({first_line(error)[:200]}): check the name."
        ) from error
    except Exception as error:  # a file that came incomplete or could not be written, redirects without end, and so on
        if not (offline and isinstance(error, LocalEntryNotFoundError)):
            raise HubError(f"{repo_id} could not be fetched whole ({first_line(error)}): load it again.") from error
        raise HubError(
            f"{repo_id} is not in the cache{f' at {revision}' if revision else ''}: load it once with the Hub at hand, "
            "without `local_files_only` and HF_HUB_OFFLINE."
        ) from error


def _describe(repo_id: str, revision: str | None, access: Access) -> ModelInfo:
    """Commit of a repository, and names and sizes of its files."""
    return retried(lambda: HfApi(token=access.token).model_info(repo_id, revision=revision, files_metadata=True))


def _check_sizes(info: ModelInfo, where: str) -> None:
    """Refuse what is too large for what it is, by the sizes that the Hub lists. Weights may have any size."""
    for file in info.siblings or ():
        name = file.rfilename
        if name == ADAPTER_WEIGHTS or name not in (*LOADED_FILES, *_BASE_FILES):
            continue
        most = MOST_DATA_BYTES if name in PLAIN_DATA else MOST_JSON_BYTES
        if file.size is not None and file.size > most:
            raise UnsafeAdapterError(f"{where} holds {name} of {file.size} bytes, more than {most}: do not load it.")


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter that passed the checks that need no model."""

    name: str  # repository or folder, as it was asked for
    folder: Path
    config: Mapping[str, Any]  # contents of `adapter_config.json`
    info: ErasureInfo | None  # contents of `erasure.json`, if there is one

    @property
    def base_id(self) -> str | None:
        """What the adapter calls its base."""
        return self.config.get("base_model_name_or_path") if self.info is None else self.info.base_model.id

    def named_base(self) -> str:
        """What the adapter calls its base, if that is something to load here; raises `HubError` if it is not."""
        name = self.base_id
        if not name:
            raise HubError(f"{self.name} names no base in {ADAPTER_CONFIG}: pass `base_model`.")
        # An adapter that was trained here may name a folder of this machine. One from elsewhere has no business with them.
        here = os.path.isdir(self.name)
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            if here and os.path.isdir(name):
                return name
            raise HubError(
                f"{self.name} was trained on {name[:200]}, which is no id on the Hub and no folder here: pass `base_model`."
            ) from error
        if os.path.exists(name):
            if self.info is not None or not here:
                raise HubError(
                    f"{self.name} was trained on {name} of the Hub, but there is a folder or file {name} here, which would be "
                    f"taken for it: load it from another place, or pass `base_model`, e.g. './{name}' for the folder."
                )
            logger.warning(
                f"{self.name} was trained on {name}: taking the folder of that name, not the Hub's repository."
            )
        return name


def find_adapter(repo_or_path: str | Path, revision: str | None, access: Access) -> FoundAdapter:
    """Fetch an adapter (a folder as it is, or the few files of a repository that are needed), and check all that needs no model."""
    here = os.path.isdir(repo_or_path)
    folder = Path(repo_or_path) if here else _fetch(str(repo_or_path), revision, access)
    published = (folder / INFO_FILE).exists()
    config = check_folder(folder, left_by_training=here and not published)
    info = None
    if published:
        info = ErasureInfo.read(folder)
        _check_info(folder, info)
    else:
        logger.warning(
            f"{repo_or_path} has no {INFO_FILE}: neither its files, nor its base, nor its answers can be verified."
        )
    return FoundAdapter(str(repo_or_path), folder, config, info)


def _check_info(folder: Path, info: ErasureInfo) -> None:
    """Check the fields of `erasure.json`, of which the table of files by the files themselves."""
    path, gguf_file = folder / INFO_FILE, info.base_model.gguf_file
    # A name that leads out is an attack, which is told before what may be a mistake.
    names = list(info.files) if isinstance(info.files, dict) else []
    check_names([*names, *([gguf_file] if isinstance(gguf_file, str) and gguf_file else [])], str(path))
    if fault := info.fault():
        raise UnsafeAdapterError(f"{path}{fault}.")
    for name, expected in info.files.items():
        # Pictures are published too, but not fetched for loading.
        if not (folder / name).is_file():
            if name in LOADED_FILES:
                raise UnsafeAdapterError(f"{path} names {name}, which is missing: download or publish it again.")
            continue
        found = file_sha256(folder / name)
        if found != expected:
            raise UnsafeAdapterError(
                f"{folder / name} is not the file that was published: its SHA-256 is {found[:12]}…, but {INFO_FILE} says "
                f"{expected[:12]}…. Delete {(folder / name).resolve()}, and load it again; if that does not help, it has to "
                "be published again."
            )
    for name in LOADED_FILES:
        if name != INFO_FILE and name not in info.files and (folder / name).exists():
            raise UnsafeAdapterError(f"{folder / name} is not among the files that {INFO_FILE} vouches for.")


@contextmanager
def strangers_files(what: str, name: str = "") -> Iterator[None]:
    """Whatever libraries make of files that somebody else wrote becomes a `HubError` that says what was tried."""
    try:
        with named_errors(name, what):
            yield
    except (UploadError, OSError) as error:
        cause = error.__cause__ if isinstance(error, UploadError) else error
        raise HubError(
            f"{what} ({first_line(cause or error)}). Check the network; for a gated or private model run `hf auth login`; "
            "offline, load it once before; or name a copy with `base_model`."
        ) from error
    except HubError:
        raise
    except BaseException as error:
        # tokenizers panics on some files; what Rust makes of that is no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, ImportError) and name in PACKAGED_MODELS:
            raise
        raise HubError(
            f"{what} ({first_line(error)}). Its files may be broken, or not for the installed transformers and PEFT: name "
            "another copy, or ask its author."
        ) from error


# Parts that are built one by one.
_BUILT = re.compile(r"(layers?|depth|blocks|experts)$")
# transformers compares names of modules with them, as regular expressions.
_PATTERNS = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers", "targets")


def check_base_config(name: str, revision: str | None, access: Access) -> None:
    """Check what a base on the Hub or in a folder says of itself, before transformers reads it.

    Refused are an adapter, kernels from the Hub, what would take for ever to build, and files that are far too large.
    """
    if name in PACKAGED_MODELS or name.endswith(".gguf"):
        return
    offline = access.local_files_only or constants.HF_HUB_OFFLINE
    if not (offline or Path(name).is_dir()):
        try:
            with named_errors(name, f"Loading the base model {name}"):
                _check_sizes(_describe(name, revision, access), f"The base model {name}")
        except UploadError:
            pass  # It may lie in the cache whole; if not, transformers says so.
    options: dict[str, Any] = vars(access) | {"revision": revision, "local_files_only": offline}
    # transformers would load an adapter that is named as a base on a further base, and check none of it.
    if find_adapter_config_file(name, **options) is not None:
        raise UnsafeAdapterError(f"The base model {name} is itself an adapter: name the model that it belongs to.")
    path = cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **options)
    if path is not None:
        _check_config(read_json(Path(path)), f"The base model {name}")


def _check_config(config: Any, base: str) -> None:
    for key, value, _ in walk(config):
        if "implementation" in key and any("/" in text for text in _texts(value)):
            raise UnsafeAdapterError(
                f"{base}: `{key}` is {short(value)}, a kernel on the Hub, whose code would run here: pass another base as "
                "`base_model`."
            )
        if _BUILT.search(key) and type(value) is int and value > MOST_PARTS:
            raise UnsafeAdapterError(
                f"{base}: `{key}` is {short(value)}, more than {MOST_PARTS}: it would never be built. Pass another base as "
                "`base_model`."
            )
        for text in _texts(value) if key in _PATTERNS else ():
            pattern = text.removeprefix("re:")
            try:
                if not is_plain_name(pattern) and matching_steps(pattern, before=1) > MOST_BASE_STEPS:
                    raise ValueError("too many parts of it take any text")
            except ValueError as error:
                raise UnsafeAdapterError(
                    f"{base}: `{key}` holds {short(text)}, a pattern that might take for ever to match, as {error}: pass "
                    "another base as `base_model`."
                ) from error


def _texts(content: Any) -> list[str]:
    return [value for _, value, _ in walk(content) if isinstance(value, str)]


_TEXT = "The capital of Peru is Lima, 42 km² away.\n\n  Isn't it? 東京 🙂" + " a" * 40
# Jinja has no `while`, but loops in loops, and `9**9**9` is worked out when a template is compiled. Both happen in C or
# without end, where nothing in the same process can stop them. What transformers adds to Jinja is added here too.
_RENDER = """
import json, sys
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
template, seconds, size = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
except ImportError:  # Windows
    pass

class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)
    def _body(self, caller):
        return caller()

def refuse(message):
    raise ValueError(message)

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)
environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: "1 January 2026")
user = {"role": "user", "content": "What is the capital of Peru?"}
chats = [[user], [user, {"role": "assistant", "content": "Lima."}, user], [{"role": "system", "content": "Be brief."}, user]]
longest = 0
for messages in chats:
    for begin in (True, False):
        try:
            told = environment.from_string(template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=begin, bos_token="<s>", eos_token="</s>"
            )
        except MemoryError:
            raise
        except Exception:  # transformers will say what is wrong with it
            continue
        longest = max(longest, len(told))
print(longest)
"""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Try a tokenizer on a short text, and its chat templates on short chats, within limits of time, memory and length.

    Of broken rules whatever tokenizers makes is raised.
    """
    tokenizer.decode(tokenizer(_TEXT)["input_ids"])
    templates = tokenizer.chat_template or ()
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if isinstance(template, str) and (fault := _fault(template)):
            raise UnsafeAdapterError(f"The chat template of {whose} {fault}: do not use it.")


def _fault(template: str) -> str | None:
    """What is wrong with a template, if anything."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _RENDER],
            input=json.dumps([template, TEMPLATE_SECONDS, TEMPLATE_BYTES]),
            capture_output=True,
            text=True,
            timeout=10 * TEMPLATE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "does not come to an end"
    if done.returncode < 0:
        return f"takes more than {TEMPLATE_SECONDS} s for a chat of a few words"
    if done.returncode > 0:
        return f"takes more than {TEMPLATE_BYTES >> 30} GiB for a chat of a few words"
    if int(done.stdout) > TEMPLATE_CHARACTERS:
        return f"writes {int(done.stdout)} characters for a chat of a few words"
    return None
