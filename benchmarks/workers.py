"""Sides of a comparison, each in a process of its own, which take turns; and how much memory a process holds, and held at most.

Every side loads and prepares once and then waits; while one trains, the others sleep. So memory is each side's alone, and
what disturbs the machine disturbs all sides alike.
"""

import ctypes
import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback


_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Memory held now: resident set of the process, or what torch has allocated on the accelerator."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _field("VmRSS")


def peak_bytes() -> int:
    """Largest value of `resident_bytes` since the process began, or since `reset_peak`.

    Unlike `ru_maxrss` this does not begin at the size of the process that started this one.
    """
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _field("VmHWM")


def reset_peak() -> None:
    """Let `peak_bytes` begin anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        # "5" is the kernel's word for: reset the peak of the resident set.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def release_freed() -> None:
    """Give memory that was freed back to the system, which keeps it within the process for later use otherwise.

    So what set-up has freed neither counts as held nor hides what a step takes.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        # Of glibc; another C library has no such name, and says so.
        ctypes.CDLL(None).malloc_trim(0)


def _field(name: str) -> int:
    if not _STATUS.exists():
        raise OSError(f"{_STATUS} does not exist, where peak memory is read: run the benchmarks on Linux.")
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(value) * 1024


class Pacer:
    """The worker's end: trains in blocks, each when it is asked for.

    Args:
        connection (`Connection`): Pipe to the process that measures.

    Attributes:
        measure (`Callable`): What else is to be reported of a block, found while no clock runs.
    """

    def __init__(self, connection: Connection):
        self.measure: Callable[[], dict[str, Any]] = dict
        self._connection = connection
        self._floor = 0
        self._setup: dict[str, float] = {}
        self._wanted = self._done = 0
        self._began = 0.0

    def lap(self, name: str, seconds: float) -> None:
        """Note how long a part of the set-up took."""
        self._setup[name] = seconds

    def start(self) -> bool:
        """Say that all is prepared, and wait for the first block; false if none is wanted."""
        setup_peak = peak_bytes()
        release_freed()
        self._floor = resident_bytes()
        self._connection.send({"setup": self._setup, "floor": self._floor, "setup_peak": setup_peak})
        return self._wait()

    def step(self) -> bool:
        """Note that an update is done; at the end of a block report and wait. False when training is to end."""
        self._done += 1
        if self._done < self._wanted:
            return True
        seconds = time.perf_counter() - self._began
        peak = peak_bytes()
        self._connection.send({"seconds": seconds, "peak": peak, "added": peak - self._floor} | self.measure())
        return self._wait()

    def _wait(self) -> bool:
        wanted = self._connection.recv()
        if wanted is None:
            return False
        self._wanted, self._done = wanted, 0
        reset_peak()
        self._began = time.perf_counter()
        return True


class PacedTraining(TrainerCallback):
    """Hands the steps of a `Trainer` to a [`Pacer`]."""

    def __init__(self, pacer: Pacer):
        self._pacer = pacer

    def on_train_begin(self, args, state, control, **kwargs):
        if not self._pacer.start():
            control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        if not self._pacer.step():
            control.should_training_stop = True


class Lap(TrainerCallback):
    """Notes how long it took until training begins. It must stand before [`PacedTraining`].

    Args:
        pacer ([`Pacer`]): Where it is noted.
        name (`str`): What took so long.
    """

    def __init__(self, pacer: Pacer, name: str):
        self._pacer, self._name, self._started = pacer, name, time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._pacer.lap(self._name, time.perf_counter() - self._started)


class Worker:
    """The measuring process's end of a side.

    Args:
        name (`str`): Name of the side, for messages.
        work (`Callable`): Trains, given a [`Pacer`], a folder that is removed afterwards, and `arguments`; all of it must be
            picklable.
        arguments (`Sequence`): Further arguments of `work`.
        threads (`int`): Threads of torch.
        environment (`Mapping[str, str]`, *optional*): Further variables of the process.

    Raises:
        RuntimeError: from any method, if the side's process failed; with its traceback.
    """

    def __init__(
        self,
        name: str,
        work: Callable[..., None],
        arguments: Sequence[Any],
        threads: int,
        environment: Mapping[str, str] | None = None,
    ):
        self._name = name
        self._folder = tempfile.TemporaryDirectory(prefix="elm-bench-")
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, work, tuple(arguments), self._folder.name), daemon=True
        )
        # A cache of its own, so that nothing is found there which a baseline had to make. Read when it is imported.
        given = {"HF_DATASETS_CACHE": self._folder.name, "OMP_NUM_THREADS": str(threads), **(environment or {})}
        with mock.patch.dict(os.environ, given):
            self._process.start()
        child.close()
        self.ready: dict[str, Any] = {}

    def wait(self) -> "Worker":
        """Wait until the side is prepared; `ready` then says how long that took."""
        self.ready = self._receive()
        return self

    def run(self, updates: int) -> dict[str, Any]:
        """Let the side train for a block of updates, and return its `seconds`, its `peak` of memory and what it `added`."""
        self._connection.send(updates)
        return self._receive()

    def close(self) -> None:
        """End the side's process and remove its folder."""
        try:
            self._connection.send(None)
        except OSError:
            pass
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()
        self._folder.cleanup()

    def _receive(self) -> dict[str, Any]:
        try:
            found = self._connection.recv()
        except EOFError:
            self._process.join(timeout=30)
            raise RuntimeError(f"The side {self._name!r} ended with code {self._process.exitcode}.") from None
        if "failed" in found:
            raise RuntimeError(f"The side {self._name!r} failed:\n{found['failed']}")
        return found


@contextmanager
def workers(
    sides: Mapping[str, tuple[Callable[..., None], Sequence[Any]]],
    threads: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Worker]]:
    """Start and prepare the sides one after another, and end them afterwards."""
    with ExitStack() as stack:
        started = {}
        for name, (work, arguments) in sides.items():
            worker = Worker(name, work, arguments, threads, environment)
            stack.callback(worker.close)
            started[name] = worker.wait()
        yield started


def take_turns(
    started: Mapping[str, Worker], rounds: int, updates: Mapping[str, int]
) -> dict[str, list[dict[str, Any]]]:
    """Let every side train one block per round, in an order that turns round from one to the next.

    Args:
        started (`Mapping[str, Worker]`): Sides that are prepared.
        rounds (`int`): Rounds that count.
        updates (`Mapping[str, int]`): Updates of a block, by side.

    Returns:
        `dict[str, list[dict]]`: what [`Worker.run`] gave in each round, by side.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in started}
    for index in range(rounds):
        for name in in_turn(list(started), index):
            found[name].append(started[name].run(updates[name]))
    return found


def in_turn(names: Sequence[str], index: int) -> list[str]:
    """The order of a round: forward in even rounds, backward in odd ones."""
    return list(names) if index % 2 == 0 else list(reversed(names))


def _serve(connection: Connection, work: Callable[..., None], arguments: tuple[Any, ...], folder: str) -> None:
    try:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch.manual_seed(0)
        work(Pacer(connection), folder, *arguments)
    except BaseException:
        connection.send({"failed": traceback.format_exc()})
        raise
