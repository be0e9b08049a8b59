"""Peak memory of a stretch of code, on the CPU or on a GPU."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch


@dataclass
class PeakMemory:
    """``bytes`` is the most that was held above what was held on entry."""

    bytes: int = 0


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_memory(device: torch.device | str = "cpu"):
    """Measure the extra memory of a ``with`` block; read ``.bytes`` after it.

    On CUDA this is the allocator's own peak. On the CPU free heap pages are returned to the system first, then the
    process's resident size is sampled every two milliseconds; without Linux's /proc the result stays 0.
    """
    device = torch.device(device)
    result = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    if not os.path.exists("/proc/self/statm"):
        yield result
        return
    with suppress(OSError, AttributeError):  # another C library keeps its free pages: the figure is a lower bound
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, done = _resident_bytes(), threading.Event()

    def sample():
        while not done.wait(0.002):
            result.bytes = max(result.bytes, _resident_bytes() - before)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()
