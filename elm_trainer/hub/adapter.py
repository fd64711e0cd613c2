"""Fetch an adapter (a folder as it is, or the few files of a repository that are needed) and check it before any model is loaded."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from transformers.utils import logging

from ..files import file_sha256
from .adapter_config import is_revision
from .errors import HubError, UnsafeAdapterError, UploadError, bounded_waits, first_line, named_errors, retried
from .info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INFO_FILE, ErasureInfo, Probe
from .safety import LOADED_FILES, PLAIN_DATA, check_folder, check_names
from .untrusted import LONGEST_PROBE, MOST_DATA_BYTES, MOST_JSON_BYTES, MOST_PROBES


logger = logging.get_logger(__name__)
# What transformers reads of a base beside its weights and what an adapter may ship too.
_BASE_FILES = ("config.json", "generation_config.json", "chat_template.json", "processor_config.json")


@dataclass(frozen=True)
class Access:
    """How to reach the Hub.

    Args:
        token (`str`, *optional*): Token, where the one of `hf auth login` is not meant.
        cache_dir (`str` or `Path`, *optional*): Cache of huggingface_hub, where another one is meant.
        local_files_only (`bool`, *optional*, defaults to `False`): Whether to load from the cache alone.
    """

    token: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


def _fetch(repo_id: str, revision: str | None, access: Access) -> Path:
    """Snapshot of a repository. What it lists is checked before any of it is downloaded."""
    offline = access.local_files_only or constants.HF_HUB_OFFLINE
    try:
        with bounded_waits(), named_errors(repo_id, f"Loading {repo_id}"):
            if not offline:
                return _download(repo_id, revision, access)
            folder = snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=access.cache_dir,
                local_files_only=True,
                allow_patterns=list(LOADED_FILES),
            )
            return Path(folder)
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


def describe(repo_id: str, revision: str | None, access: Access) -> ModelInfo:
    """Commit of a repository, and names and sizes of its files."""
    return retried(lambda: HfApi(token=access.token).model_info(repo_id, revision=revision, files_metadata=True))


def check_sizes(files: Iterable[RepoSibling], where: str) -> None:
    """Refuse what is too large for what it is, by the sizes that the Hub lists. Weights may have any size.

    Raises:
        UnsafeAdapterError: naming the file and its size.
    """
    for file in files:
        name = file.rfilename
        if name == ADAPTER_WEIGHTS or name not in (*LOADED_FILES, *_BASE_FILES):
            continue
        most = MOST_DATA_BYTES if name in PLAIN_DATA else MOST_JSON_BYTES
        if file.size is not None and file.size > most:
            raise UnsafeAdapterError(f"{where} holds {name} of {file.size} bytes, more than {most}: do not load it.")


def _download(repo_id: str, revision: str | None, access: Access) -> Path:
    info = describe(repo_id, revision, access)
    names = [file.rfilename for file in info.siblings or ()]
    check_names(names, repo_id)
    check_sizes(info.siblings or (), repo_id)
    if ADAPTER_CONFIG not in names:
        raise HubError(f"{repo_id} holds no {ADAPTER_CONFIG}: it is not the repository of an adapter.")
    folder = retried(
        lambda: snapshot_download(
            repo_id,
            revision=revision,
            token=access.token,
            cache_dir=access.cache_dir,
            allow_patterns=[name for name in LOADED_FILES if name in names],
        )
    )
    if Path(folder).name != info.sha:
        raise HubError(f"{repo_id} was changed while it was loaded: load it again, or name a commit as `revision`.")
    return Path(folder)


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter that passed the checks that need no model.

    Args:
        name (`str`): Repository or folder, as it was asked for.
        folder (`Path`): Where its files are.
        config (`Mapping`): Contents of `adapter_config.json`.
        info ([`ErasureInfo`], *optional*): Contents of `erasure.json`; `None` where there is none.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    info: ErasureInfo | None

    @property
    def base_id(self) -> str | None:
        """What the adapter calls its base."""
        return self.config.get("base_model_name_or_path") if self.info is None else self.info.base_model.id


def find_adapter(repo_or_path: str | Path, revision: str | None, access: Access) -> FoundAdapter:
    """Fetch an adapter, and make all checks of it that need no model.

    Args:
        repo_or_path: Folder, or Hub id.
        revision: Commit, tag or branch of the repository.
        access: How to reach the Hub.

    Raises:
        UnsafeAdapterError: if it could run code, or is not what `erasure.json` says.
        HubError: if there is no such folder or repository, it can't be reached, or is not in the cache.
    """
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
    path = folder / INFO_FILE
    base = info.base_model
    if isinstance(info.files, dict):
        check_names(info.files, str(path))
    if not _are_hashes(base.fingerprint) or not _are_hashes(info.files):
        raise UnsafeAdapterError(
            f"{path}: `fingerprint` and `files` must be tables of SHA-256: publish the adapter again."
        )
    if ADAPTER_WEIGHTS not in info.files or "unquantized" not in base.fingerprint:
        raise UnsafeAdapterError(
            f"{path} holds no hash of {ADAPTER_WEIGHTS} or of the base's weights: publish the adapter again."
        )
    if not isinstance(base.id, str) or not is_revision(base.revision) or not isinstance(base.gguf_file, str | None):
        raise UnsafeAdapterError(
            f"{path}: `base_model` needs the id and a commit of the base: publish the adapter again."
        )
    check_names([base.gguf_file] if base.gguf_file else [], str(path))
    _check_probes(path, info.verification)
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


def _are_hashes(table: Any) -> bool:
    return isinstance(table, dict) and all(
        isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) for text in table.values()
    )


def _check_probes(path: Path, probes: Sequence[Probe]) -> None:
    if len(probes) > MOST_PROBES:
        raise UnsafeAdapterError(
            f"{path}: `verification` has {len(probes)} entries, more than {MOST_PROBES}: do not ask them."
        )
    for place, probe in enumerate(probes):
        texts = (probe.prompt, probe.answer)
        if not all(isinstance(text, str) and text for text in texts):
            fault = "needs a prompt and an answer, both texts"
        elif (length := sum(map(len, texts))) > LONGEST_PROBE:
            fault = f"has {length} characters, more than {LONGEST_PROBE}: do not ask it"
        elif type(probe.tokens) is not int or probe.tokens < 1 or type(probe.log_likelihood) not in (int, float):
            fault = "needs `tokens`, a number from 1, and `log_likelihood`"
        else:
            continue
        raise UnsafeAdapterError(f"{path}: entry {place} of `verification` {fault}.")
