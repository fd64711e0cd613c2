"""Bringing an adapter here: a folder as it is, or the few files of a repository that are needed and safe."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from .errors import HubError, UnsafeAdapterError, UploadError
from .failures import first_line, named_errors, patience, retried
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .safety import LOADED_FILES, PLAIN_DATA, check_names
from .untrusted_json import MOST_BYTES


# Vocabularies; the largest that are common have 35 MB.
_MOST_DATA_BYTES = 200_000_000
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


def fetch_adapter(repo_or_path: str | Path, revision: str | None, access: Access) -> Path:
    """Folder of an adapter. What a repository lists is checked before any of it is downloaded.

    Args:
        repo_or_path (`str` or `Path`): Folder, or Hub id.
        revision (`str`, *optional*): Commit, tag or branch of the repository.
        access ([`Access`]): How to reach the Hub.

    Raises:
        UnsafeAdapterError: if the repository lists what no adapter needs.
        HubError: if there is no such folder or repository, it can't be reached, or is not in the cache.
    """
    if os.path.isdir(repo_or_path):
        return Path(repo_or_path)
    repo_id = str(repo_or_path)
    offline = access.local_files_only or constants.HF_HUB_OFFLINE
    try:
        with patience(), named_errors(repo_id, f"Loading {repo_id}"):
            if offline:
                return Path(
                    snapshot_download(
                        repo_id,
                        revision=revision,
                        cache_dir=access.cache_dir,
                        local_files_only=True,
                        allow_patterns=list(LOADED_FILES),
                    )
                )
            return _download(repo_id, revision, access)
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
        most = _MOST_DATA_BYTES if name in PLAIN_DATA else MOST_BYTES
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
