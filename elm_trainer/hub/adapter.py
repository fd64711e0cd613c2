"""An adapter that was fetched and looked through, before any model is loaded."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..checksums import file_sha256
from .adapter_config import is_revision
from .errors import UnsafeAdapterError
from .fetch import Access, fetch_adapter
from .files import ADAPTER_WEIGHTS
from .info import INFO_FILE, ErasureInfo, Probe
from .safety import LOADED_FILES, check_folder, check_names
from .verify import LONGEST_PROBE, MOST_PROBES


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
    config = check_folder(folder, left_by_training=os.path.isdir(repo_or_path) and not published)
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
    if isinstance(info.files, dict):
        check_names(info.files, str(path))
    if not all(isinstance(table, dict) for table in tables) or not all(
        isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) for table in tables for text in table.values()
    ):
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


def _check_probes(path: Path, probes: Sequence[Probe]) -> None:
    if len(probes) > MOST_PROBES:
        raise UnsafeAdapterError(
            f"{path}: `verification` has {len(probes)} entries, more than {MOST_PROBES}: do not ask them."
        )
    for place, probe in enumerate(probes):
        texts = (probe.prompt, probe.answer)
        if not all(isinstance(text, str) and text for text in texts):
            raise UnsafeAdapterError(
                f"{path}: entry {place} of `verification` needs a prompt and an answer, both texts."
            )
        if sum(map(len, texts)) > LONGEST_PROBE:
            raise UnsafeAdapterError(
                f"{path}: entry {place} of `verification` has {sum(map(len, texts))} characters, more than {LONGEST_PROBE}: "
                "do not ask it."
            )
        if type(probe.tokens) is not int or probe.tokens < 1 or type(probe.log_likelihood) not in (int, float):
            raise UnsafeAdapterError(
                f"{path}: entry {place} of `verification` needs `tokens`, a number from 1, and `log_likelihood`."
            )
