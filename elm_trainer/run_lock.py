"""One run at a time in a folder."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from .distributed import on_first
from .files import discard, discard_unfinished, read_object, write_json


logger = logging.get_logger(__name__)
LOCK_FILE = ".elm-run.lock"
# Who holds the lock. A separate file, since some versions of filelock empty the other when they try it.
HOLDER_FILE = ".elm-run.json"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class FolderInUseError(RuntimeError):
    """Another run is writing to the folder."""


@contextmanager
def only_run_in(folder: str | Path | None) -> Iterator[None]:
    """Keep other runs out of a folder, which is made, while the block lasts; without a folder there is nothing to do.

    All processes of a launch enter together, and the first takes the lock for them. The process that holds it may enter
    again. The operating system frees the lock of a process that has ended, however it did.

    Raises:
        FolderInUseError: if another run is in the folder; it names that run's process, machine and start.
        OSError: if the folder cannot be written to.
    """
    with ExitStack() as held:
        if folder is not None:
            on_first(lambda: held.enter_context(_locked(Path(folder))))
        yield


@contextmanager
def waiting_turn(path: Path) -> Iterator[None]:
    """Wait for the run that holds the lock at `path`, in a `cache_dir`, if there is one, and hold it while the block lasts.

    Raises `OSError` if the lock's folder cannot be written to.
    """
    lock = FileLock(path)
    with _named(path.parent, "cache_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.warning(f"Another run makes what is wanted in {path.parent}: waiting for it.")
            lock.acquire()
    try:
        yield
    finally:
        # Whoever still waits for it finds its work done.
        discard(path)
        lock.release()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK_FILE, is_singleton=True, thread_local=False)
    try:
        with _named(folder, "output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUseError(
            f"`output_dir` is {str(folder)!r}, where another run is writing ({_holder(folder)}): wait for it or end it, or "
            f"name another folder. If it is gone for certain, delete {folder / LOCK_FILE}."
        ) from error
    outermost = lock.is_locked and lock.lock_counter == 1
    try:
        if outermost:
            discard_unfinished(folder)
            started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            holder = {"process": os.getpid(), "host": socket.gethostname(), "started": started}
            write_json(folder / HOLDER_FILE, holder)
        yield
    finally:
        if outermost:
            # Before the lock is given back: afterwards they may be another run's.
            discard(folder / HOLDER_FILE)
            discard(folder / LOCK_FILE)
        lock.release()


@contextmanager
def _named(folder: Path, argument: str) -> Iterator[None]:
    """Names a folder that cannot be written to, and continues without a lock where the drive has none."""
    try:
        yield
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in _NO_LOCKS:
            logger.warning(
                f"The drive of {folder} has no locks ({error}): let no other run write to it at the same time."
            )
            return
        raise OSError(
            error.errno,
            f"`{argument}` is {str(folder)!r}, which cannot be written to ({error.strerror}): name another folder",
        ) from error


def _holder(folder: Path) -> str:
    try:
        holder = read_object(folder / HOLDER_FILE)
        return f"process {holder['process']} on {holder['host']}, started {holder['started']}"
    except (OSError, ValueError, KeyError):
        return "its process is not known"
