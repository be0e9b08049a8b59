"""What a piece of code would cost, counted from the operators that it runs on fake tensors: nothing is computed.

The fake device is the CPU: there attention is one fused operator whose backward keeps its output and statistics alone,
as the GPU's kernels do, while on a fake GPU PyTorch falls back to the formula and materialises the scores.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _multi_head_attention(q: Tensor, *_, **__) -> int:
    """All of ``nn.MultiheadAttention`` on one sequence [B, N, C]: what it is under ``no_grad``."""
    batch, tokens, width = q.shape
    return batch * (8 * tokens * width**2 + 4 * tokens**2 * width)


# Products that PyTorch's own table leaves out. Costs are those of dense products: attention's backward is five of them.
_FLOPS: dict[object, Callable[..., int]] = {
    aten._native_multi_head_attention: _multi_head_attention,
    aten.addmm_: lambda _, a, b, **__: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad.shape, q.shape, k.shape, v.shape
    ),
}
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: "attention",
    aten._scaled_dot_product_flash_attention_for_cpu_backward: "attention backward",
}
_DATA = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}  # read a number from memory


class Kernel(NamedTuple):
    """One operator: what it is, what it computes and what it moves.

    Attributes:
        kind: "product" (matrix products and convolutions), "attention", "attention backward" or "other".
        backward: whether autograd started it.
        flops: 2 per multiply-add of its products; 0 for other operators.
        bytes: every distinct operand read once and every output written once.
        head_dim: of attention; 0 otherwise.
    """

    kind: str
    backward: bool
    flops: int
    bytes: int
    head_dim: int = 0


@dataclass
class Cost:
    """Counted kernels and memory. Of one after the other: sums of the kernels, and the larger memory.

    Attributes:
        kernels: how often which kernel runs.
        peak: the most bytes that were alive at once above those alive at the start.
        kept: bytes alive after the forward, above those alive at the start: its outputs and what a backward needs.
    """

    kernels: Counter[Kernel] = field(default_factory=Counter)
    peak: int = 0
    kept: int = 0

    @property
    def flops(self) -> float:
        return sum(kernel.flops * count for kernel, count in self.kernels.items())

    @property
    def bytes(self) -> float:
        return sum(kernel.bytes * count for kernel, count in self.kernels.items())

    @property
    def product_bytes(self) -> float:
        """Bytes of the kernels that do arithmetic: no fusion can save them."""
        return sum(kernel.bytes * count for kernel, count in self.kernels.items() if kernel.flops)

    @property
    def launches(self) -> float:
        return sum(self.kernels.values())

    def __add__(self, other: Cost) -> Cost:
        kernels = Counter(self.kernels)
        kernels.update(other.kernels)
        return Cost(kernels, max(self.peak, other.peak), max(self.kept, other.kept))

    def __mul__(self, times: float) -> Cost:
        return replace(self, kernels=Counter({kernel: count * times for kernel, count in self.kernels.items()}))

    __rmul__ = __mul__


def nested(outer: Cost, inner: Cost) -> Cost:
    """The inner cost arises between the outer's forward and backward, while what the outer keeps is alive."""
    both = outer + inner
    both.peak = max(outer.peak, outer.kept + inner.peak)
    both.kept = outer.kept
    return both


class _Counting(TorchDispatchMode):
    """Counts kernels, and the bytes of every storage from when an operator makes it until the last reference goes."""

    def __init__(self):
        super().__init__()
        self.cost = Cost()
        self.live = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def is_new(self, tensor: Tensor) -> bool:
        """Whether this is the first that is seen of the tensor's storage."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        self._known.add(storage)
        return True

    def _made(self, tensor: Tensor) -> bool:
        """Count a new storage; whether it is one."""
        if not self.is_new(tensor):
            return False
        size = tensor.untyped_storage().nbytes()
        self.live += size
        self.cost.peak = max(self.cost.peak, self.live)
        weakref.finalize(tensor.untyped_storage(), self._free, size).atexit = False
        return True

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet in _DATA:  # the checks of inputs that look at numbers: none of them finds anything
            return False
        if packet is aten._fused_sdp_choice:  # without numbers it answers as for no device at all
            return SDPBackend.FLASH_ATTENTION.value
        inputs = _tensors(args) + _tensors(kwargs.values())
        for tensor in inputs:
            self.is_new(tensor)  # it was there before, and a view of it is no memory
        out = func(*args, **kwargs)
        outputs = _tensors(_as_tuple(out))
        made = [t for t in outputs if self._made(t)]
        if made or func._schema.is_mutable:
            self.cost.kernels[_kernel(packet, args, kwargs, out, inputs, outputs)] += 1
        return out


def _kernel(packet, args, kwargs, out, inputs: list[Tensor], outputs: list[Tensor]) -> Kernel:
    moved = sum(_operand_bytes(inputs).values()) + sum(_operand_bytes(outputs).values())
    flops = flops_of(packet, args, kwargs, out)
    kind = _ATTENTION.get(packet, "product" if flops else "other")
    head_dim = inputs[0].shape[-1] if packet in _ATTENTION else 0
    return Kernel(kind, torch._C._current_autograd_node() is not None, flops, moved, head_dim)


def flops_of(packet, args: tuple, kwargs: dict[str, Any], out) -> int:
    """2 per multiply-add of a product, a convolution or an attention, as the ``OpOverloadPacket`` is called and what it
    returned; 0 for other operators.
    """
    if packet in _FLOPS:
        return int(_FLOPS[packet](*args, **kwargs))
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


def _operand_bytes(tensors: list[Tensor]) -> dict[tuple, int]:
    """Bytes of distinct operands; an expanded dimension counts once."""
    found = {}
    for t in tensors:
        elements = 1
        for size, stride in zip(t.shape, t.stride(), strict=True):
            elements *= size if stride or not size else 1
        key = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride())
        found[key] = elements * t.element_size()
    return found


def _tensors(values) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _as_tuple(out):
    return out if isinstance(out, (list, tuple)) else (out,)


def fake_tensors() -> FakeTensorMode:
    """Within it tensors have shapes and no numbers; modules built there can be counted there."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def count(forward: Callable[[], Any], backward: Callable[[Any], Any] | None = None) -> Cost:
    """The cost of ``forward()``, or of ``backward(forward())``. To be called within :func:`fake_tensors`.

    Tensors that exist before do not count as memory.
    """
    counting = _Counting()
    with counting:
        result = forward()
        counting.cost.kept = counting.live
        if backward is not None:
            result = backward(result)
    del result
    return counting.cost
