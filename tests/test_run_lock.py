import errno
import json
import os
import signal
import socket
from multiprocessing import get_context
from threading import Thread

import pytest
from filelock import FileLock

from elm_trainer.files import UNFINISHED
from elm_trainer.run_lock import HOLDER_FILE, LOCK_FILE, FolderInUseError, only_run_in, waiting_turn


def hold(folder, pipe, fork):
    with only_run_in(folder):
        if fork and os.fork() == 0:
            pipe.send(os.getpid())
        elif not fork:
            pipe.send(os.getpid())
        signal.pause()


def start(folder, fork=False):
    """A process that holds the folder, and the process that sleeps in it: itself, or one that it has forked."""
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(folder, theirs, fork))
    process.start()
    return process, ours.recv()


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process, _ = start(tmp_path)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_with_process_host_and_start_of_the_first(other, tmp_path):
    message = rf"`output_dir` is .* another run is writing .process {other.pid} on {socket.gethostname()}, started 20\d\d-.*UTC"
    with pytest.raises(FolderInUseError, match=message), only_run_in(tmp_path):
        pass
    # A refusal takes nothing from the holder.
    with pytest.raises(FolderInUseError, match=message), only_run_in(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"process": 1}', b"\xff"])
def test_a_damaged_name_of_the_holder_is_no_obstacle(content, other, tmp_path):
    (tmp_path / HOLDER_FILE).write_bytes(content)
    with pytest.raises(FolderInUseError, match="its process is not known"), only_run_in(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(other, tmp_path):
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert (tmp_path / LOCK_FILE).exists()
    (tmp_path / f"{UNFINISHED}half").write_text("")
    with only_run_in(tmp_path):
        assert json.loads((tmp_path / HOLDER_FILE).read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_process_may_enter_again_and_leaves_only_at_the_end(tmp_path):
    with only_run_in(tmp_path):
        with only_run_in(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists() and (tmp_path / HOLDER_FILE).exists()
    with pytest.raises(KeyError), only_run_in(tmp_path):
        raise KeyError
    with only_run_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_run_has_forked_holds_nothing_when_the_run_is_gone(tmp_path):
    """Such as the workers of a `DataLoader`, which outlive a killed run by seconds."""
    process, forked = start(tmp_path, fork=True)
    process.kill()
    process.join()
    try:
        with only_run_in(tmp_path):
            pass
    finally:
        os.kill(forked, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(OSError, match=f"`output_dir` is '{folder}', which cannot be written to"),
            only_run_in(folder),
        ):
            pass


def test_without_a_folder_there_is_nothing_to_lock():
    with only_run_in(None):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("FileSystem")])
def test_on_a_drive_without_locks_a_run_goes_on(error, tmp_path, monkeypatch):
    def without(*_, **__):
        raise error

    monkeypatch.setattr(FileLock, "acquire", without)
    for context in (only_run_in(tmp_path / "run"), waiting_turn(tmp_path / "cache" / "a.lock")):
        with context:
            pass
    assert (tmp_path / "run").is_dir() and (tmp_path / "cache").is_dir()


def test_a_turn_is_waited_for(tmp_path):
    done = []

    def second():
        with waiting_turn(tmp_path / "a.lock"):
            done.append("second")

    thread = Thread(target=second)
    with waiting_turn(tmp_path / "a.lock"):
        thread.start()
        thread.join(0.3)
        done.append("first")
    thread.join(10)
    assert done == ["first", "second"] and not list(tmp_path.iterdir())
