"""How far a process's memory has risen."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def start_memory() -> int:
    """Give back what is free, forget earlier peaks where that can be done, and return what is held now, in bytes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):  # both exist on Linux alone
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _from_status("VmRSS") or peak_memory()


def peak_memory() -> int:
    """Most bytes held since :func:`start_memory`: allocated on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss where there is another way: it holds the peak of the process that started this one.
    held = _from_status("VmHWM")
    return held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _from_status(key: str) -> int:
    if not _STATUS.exists():
        return 0
    found = [line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":")]
    return int(found[0].split()[1]) * 1024 if found else 0
