"""What a call on real tensors costs: products in FLOPs, memory, and what autograd keeps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..measure import peak_memory
from ..plan.count import flops_of

SHORT = 5.0  # seconds


@dataclass
class Counted:
    """FLOPs of products, convolutions and attention; ``peak_bytes`` the most held above what was there before;
    ``kept_bytes`` the most that autograd kept for backward passes at a time, weights left out.
    """

    flops: int
    peak_bytes: int
    kept_bytes: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class FlopCount(TorchDispatchMode):
    """Adds up, in ``flops``, the products within the ``with``, backward passes included."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.flops += flops_of(func._overloadpacket, args, kwargs or {}, out)
        return out


class _Saved:
    """A tensor that autograd keeps, until it lets go of it."""

    def __init__(self, tensor: Tensor, kept: KeptBytes):
        self.tensor, self.kept, self.storage = tensor, kept, tensor.untyped_storage()
        kept.add(self.storage.data_ptr(), self.storage.nbytes())

    def __del__(self):
        self.kept.remove(self.storage.data_ptr(), self.storage.nbytes())


class KeptBytes:
    """Distinct storages, in bytes, that autograd keeps at the moment (``bytes``) and at most (``peak``)."""

    def __init__(self, exclude: list[Tensor]):
        self.exclude = {t.untyped_storage().data_ptr() for t in exclude}
        self.users: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def add(self, address: int, size: int) -> None:
        if address not in self.exclude and not self.users[address]:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.users[address] += 1

    def remove(self, address: int, size: int) -> None:
        self.users[address] -= 1
        if address not in self.exclude and not self.users[address]:
            self.bytes -= size

    @contextmanager
    def counting(self):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t, self), lambda saved: saved.tensor):
            yield self


def counted(call: Callable[[], Any], weights: list[Tensor], device: str = "cpu") -> Counted:
    """Run a call once, or twice if it is short: the first run of a process allocates what later ones find."""
    flops, kept = FlopCount(), KeptBytes(weights)
    start = time.perf_counter()
    with peak_memory(device) as peak, kept.counting(), flops:
        call()
    if time.perf_counter() - start < SHORT:
        with peak_memory(device) as peak:
            call()
    return Counted(flops.flops, peak.bytes, kept.peak)
