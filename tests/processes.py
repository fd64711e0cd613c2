"""Processes that are forked from one that has imported the libraries: to import them takes each process six seconds.

What a library reads from the environment when it is imported (`HF_HOME`, `HF_ENDPOINT`) a fork cannot change, and how
`accelerate launch` starts processes it does not show: such tests start their processes themselves.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import torch

from elm_trainer import ElmTrainer, attack_erasure, evaluate_erasure  # noqa: F401, what a fork finds imported


ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def _become(
    arguments: Sequence[str], environment: Mapping[str, str], directory: str, output: str, errors: str
) -> None:
    """Be what `python *arguments` would be."""
    for path, stream in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    torch.set_num_threads(1)
    # A fixture of the whole session knows no folder of a test.
    if "HF_DATASETS_CACHE" in environment:
        datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    kind, *rest = arguments
    sys.path.insert(0, directory)
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = str(Path(kind).resolve().parent)
        sys.argv = list(arguments)
        runpy.run_path(kind, run_name="__main__")


class Forked:
    """Like `subprocess.Popen`, for one process or, as `torchrun` starts them, for several that find one another."""

    def __init__(
        self,
        command: Sequence[str | Path],
        processes: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ):
        assert command[0] == sys.executable
        self.command = [str(word) for word in command]
        self._folder = tempfile.TemporaryDirectory()
        environment = dict(os.environ if env is None else env)
        self._processes, self._status = [], None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(processes):
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
                environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1"}
            paths = [str(Path(self._folder.name) / f"{stream}-{rank}") for stream in ("output", "errors")]
            process = CONTEXT.Process(target=_become, args=(self.command[1:], environment, str(cwd), *paths))
            process.start()
            self._processes.append(process)

    @property
    def pid(self) -> int:
        return self._processes[0].pid

    def poll(self) -> int | None:
        """The status as `subprocess` gives it; of several processes that of the first that failed, which ends all."""
        statuses = [process.exitcode for process in self._processes]
        failed = [status for status in statuses if status]
        if self._status is None and failed:
            self._status = failed[0]
            for process in self._processes:
                process.terminate()
                process.join()
        elif None not in statuses and not failed:
            self._status = 0
        return self._status

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; all that was written to standard output and to standard error."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                for process in self._processes:
                    process.kill()
                raise subprocess.TimeoutExpired(self.command, timeout)
            time.sleep(0.02)
        output, errors = (
            "".join(path.read_text() for path in sorted(Path(self._folder.name).glob(f"{stream}-*")))
            for stream in ("output", "errors")
        )
        return output, errors

    def wait(self, timeout: float = 300) -> int:
        self.communicate(timeout)
        return self.returncode

    @property
    def returncode(self) -> int | None:
        return self.poll()


def run(
    command: Sequence[str | Path], *, check: bool = False, timeout: float = 300, **options
) -> subprocess.CompletedProcess:
    """Like `subprocess.run(command, capture_output=True, text=True)`; `options` are those of `Forked`."""
    forked = Forked(command, **options)
    output, errors = forked.communicate(timeout)
    ran = subprocess.CompletedProcess(command, forked.returncode, output, errors)
    assert not (check and ran.returncode), errors[-6000:]
    return ran
