"""Bringing an adapter here: a folder as it is, or the few files of a repository that are needed and safe."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from .errors import HubError, UploadError
from .failures import named_errors, patience, retried
from .files import ADAPTER_CONFIG
from .safety import LOADED_FILES, check_names


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
    folder = Path(repo_or_path)
    if folder.is_dir():
        return folder
    repo_id = str(repo_or_path)
    try:
        with patience(), named_errors(repo_id, f"Loading {repo_id}"):
            if access.local_files_only or constants.HF_HUB_OFFLINE:
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
    except HFValidationError as error:
        raise HubError(
            f"{repo_id} is no folder here, and no id on the Hub either ({error}): check the name."
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{repo_id} is not in the cache{f' at {revision}' if revision else ''}: load it once with the Hub at hand, "
            "without `local_files_only` and HF_HUB_OFFLINE."
        ) from error
    except UploadError as error:
        raise HubError(
            f"{repo_id} could not be fetched, since the Hub can't be reached ({error.__cause__}): try again, or pass "
            "`local_files_only=True` to load a copy from the cache."
        ) from error
    except OSError as error:  # a file that came incomplete, or could not be written
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HubError(f"{repo_id} could not be fetched whole ({said}): load it again.") from error


def _download(repo_id: str, revision: str | None, access: Access) -> Path:
    info = retried(lambda: HfApi(token=access.token).model_info(repo_id, revision=revision))
    names = [file.rfilename for file in info.siblings or ()]
    check_names(names, repo_id)
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
