"""What a stretch of code takes: peak memory, seconds by phase, evaluations of the networks."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .fused.step_graph import StepGraph


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


def phase(name: str):
    """A context that a running profiler shows as a range of this name, and NVTX under ``emit_nvtx``; nothing else."""
    if not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(name)


class Stopwatch:
    """Adds up wall-clock seconds by phase; waits for the device at both ends of a phase."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, phase: str):
        start = self._now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - start


@dataclass
class Evaluations:
    """How often the networks ran, each time for one sample. Backward passes are not counted.

    Attributes:
        denoiser: forward passes, counted at the denoiser's blocks: half of its blocks run once count 0.5, whoever
            asked for them.
        prefix: of these, passes that a stitched value made by itself, through the first blocks alone.
        value: reward networks, or what a stitched value keeps of one.
        decoder: of the autoencoder.
    """

    denoiser: float = 0.0
    prefix: int = 0
    value: int = 0
    decoder: int = 0


_counting: ContextVar[Evaluations | None] = ContextVar("evaluations", default=None)


def count(kind: str, samples: int) -> None:
    """Called by whoever runs a network of this kind, for the :func:`count_evaluations` around it."""
    evaluations = _counting.get()
    if evaluations is not None:
        setattr(evaluations, kind, getattr(evaluations, kind) + samples)


@contextmanager
def count_evaluations(backbone) -> Iterator[Evaluations]:
    """Count within the ``with`` what runs on a backbone, and the values and decodings of any."""
    from .backbones.replay import Replayed  # the backbones import this module

    evaluations, share = Evaluations(), 1 / len(backbone.blocks)

    def add(module, args, kwargs):
        if not isinstance(module.__dict__.get("forward"), Replayed):
            evaluations.denoiser += share * len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def add_replay(batch: int):  # hooks do not run inside a CUDA graph
        evaluations.denoiser += batch

    handles = [block.register_forward_pre_hook(add, with_kwargs=True) for block in backbone.blocks]
    graph = backbone.denoiser.__dict__.get("forward")
    if isinstance(graph, StepGraph):
        graph.on_replay = add_replay
    token = _counting.set(evaluations)
    try:
        yield evaluations
    finally:
        _counting.reset(token)
        evaluations.denoiser = round(evaluations.denoiser, 6)
        if isinstance(graph, StepGraph):
            graph.on_replay = None
        for handle in handles:
            handle.remove()
