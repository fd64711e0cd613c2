"""How much memory this process holds, and held at most."""

import ctypes
import gc
from pathlib import Path

import torch


_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


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
        _CLEAR.write_text("5", encoding="ascii")


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
