"""An adapter that was fetched and looked through, before any model is loaded."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .errors import UnsafeAdapterError
from .fetch import Access, fetch_adapter
from .info import INFO_FILE, ErasureInfo
from .safety import LOADED_FILES, check_folder, check_names


logger = logging.get_logger(__name__)


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
        repo_or_path (`str` or `Path`): Folder, or Hub id.
        revision (`str`, *optional*): Commit, tag or branch of the repository.
        access ([`Access`]): How to reach the Hub.

    Raises:
        UnsafeAdapterError: if it could run code, or is not what `erasure.json` says.
        HubError: if there is no such folder or repository, it can't be reached, or is not in the cache.
    """
    folder = fetch_adapter(repo_or_path, revision, access)
    published = (folder / INFO_FILE).exists()
    config = check_folder(folder, left_by_training=Path(repo_or_path).is_dir() and not published)
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
    path = folder / INFO_FILE
    base = info.base_model
    tables = [base.fingerprint, info.files]
    texts = [base.id, base.revision, base.gguf_file or ""]
    texts += [text for probe in info.verification for text in (probe.prompt, probe.answer)]
    texts += [text for table in tables if isinstance(table, dict) for text in table.values()]
    if not all(isinstance(table, dict) for table in tables) or not all(isinstance(text, str) for text in texts):
        raise UnsafeAdapterError(f"{path}: names, revisions and hashes must be texts: publish the adapter again.")
    check_names([base.gguf_file] if base.gguf_file else [], str(path))
    check_names(info.files, str(path))
    for name, expected in info.files.items():
        # Pictures are published too, but not fetched for loading.
        if not (folder / name).exists():
            if name in LOADED_FILES:
                raise UnsafeAdapterError(f"{path} names {name}, which is missing: download or publish it again.")
            continue
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise UnsafeAdapterError(
                f"{folder / name} is not the file that was published: its SHA-256 is {found[:12]}…, but {INFO_FILE} says "
                f"{expected[:12]}…. Delete {(folder / name).resolve()}, and load it again; if that does not help, it has to "
                "be published again."
            )
    for name in LOADED_FILES:
        if name != INFO_FILE and name not in info.files and (folder / name).exists():
            raise UnsafeAdapterError(f"{folder / name} is not among the files that {INFO_FILE} vouches for.")
