"""What the fused blocks share: how a hand-written backward meets autograd, and how a linear layer is differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MEMORY_LEVELS = ("save", "recompute")

SECOND_DERIVATIVE = (
    "fused block: its hand-written backward has no second derivative; run the plain block (unfuse the transformer, or "
    "let a parameter require grad) to differentiate twice"
)


@dataclass(frozen=True)
class Want:
    """What a pass through a fused block has to yield, and what it may keep for the backward.

    Attributes:
        rows: int64 [R], sorted: the image tokens that the caller reads. Only their gradients are looked at in the
            backward; None for all.
        prune: compute only ``rows`` of the image stream, and no text stream; the other image tokens come out as zeros.
            Without it the forward is whole and only the backward is restricted to ``rows``.
        memory: "save" keeps queries, keys, values and the image MLP's pre-activation; "recompute" makes them again.
    """

    rows: Tensor | None = None
    prune: bool = False
    memory: str = "save"

    def __post_init__(self):
        check_memory(self.memory)


def check_memory(memory: str) -> None:
    if memory not in MEMORY_LEVELS:
        raise ValueError(f"memory: expected one of {list(MEMORY_LEVELS)}, got {memory!r}")


def is_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called: its user chose another way to fuse."""
    return module._compiled_call_impl is not None


def is_plain_linear(module: Any) -> bool:
    """Exactly ``nn.Linear`` in a floating-point dtype: an adapter or a quantised layer has another backward."""
    return type(module) is nn.Linear and module.weight.is_floating_point() and "forward" not in module.__dict__


def save(ctx, state: dict[str, Any]) -> None:
    """Keep a state on an autograd context; tensors go through autograd's own saving, where hooks see them."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    ctx.save_for_backward(*tensors.values())
    ctx.names = list(tensors)
    ctx.others = {name: value for name, value in state.items() if name not in tensors}


def load(ctx) -> dict[str, Any]:
    return {**dict(zip(ctx.names, ctx.saved_tensors, strict=True)), **ctx.others}


class Recomputed:
    """Bytes that blocks at the "recompute" level do not keep for backward passes that are still to come.

    Attributes:
        peak: the most at a time.
    """

    def __init__(self):
        self.bytes = self.peak = 0

    def add(self, nbytes: int) -> None:
        self.bytes += nbytes
        self.peak = max(self.peak, self.bytes)


_recomputed: ContextVar[Recomputed | None] = ContextVar("recomputed", default=None)


@contextmanager
def count_recomputed() -> Iterator[Recomputed]:
    """Count within the ``with`` what "recompute" spares."""
    token = _recomputed.set(Recomputed())
    try:
        yield _recomputed.get()
    finally:
        _recomputed.reset(token)


def drop(ctx, state: dict[str, Any], names: Sequence[str], instead: int = 0) -> None:
    """Take out of a state what the backward makes again; ``instead``: bytes that it keeps only for that."""
    nbytes = sum(dropped.nbytes for name in names if (dropped := state.pop(name, None)) is not None) - instead
    ctx.recomputed, ctx.not_kept = _recomputed.get(), nbytes  # the backward may run in another thread
    if ctx.recomputed is not None:
        ctx.recomputed.add(nbytes)


def undrop(ctx) -> None:
    """Called by the backward of a pass that dropped."""
    if ctx.recomputed is not None:
        ctx.recomputed.add(-ctx.not_kept)


def named_statistics(statistics: tuple, which: str = "") -> dict[str, Any]:
    """Entries of a state for what an attention's backward takes; ``which`` tells several attentions apart."""
    return {f"statistics{which}.{i}": entry for i, entry in enumerate(statistics)}


def statistics_of(state: dict[str, Any], which: str = "") -> tuple:
    prefix = f"statistics{which}."
    return tuple(state[f"{prefix}{i}"] for i in range(sum(name.startswith(prefix) for name in state)))


def select(x: Tensor, rows: Tensor | slice | None) -> Tensor:
    """Tokens ``rows`` of x [B, N, ...]; all for None."""
    if rows is None:
        return x
    return x[:, rows] if isinstance(rows, slice) else x.index_select(1, rows)


def linear_input_grad(grad: Tensor, linear: nn.Linear, into: Tensor | None = None) -> Tensor:
    """``grad W`` [B, N, in] for ``grad`` [B, N, out], added to ``into`` in place if that is given."""
    if into is None:
        return grad @ linear.weight
    into.view(-1, into.shape[-1]).addmm_(grad.reshape(-1, grad.shape[-1]), linear.weight)
    return into


def refuse_second_derivative() -> None:
    """Called in a backward: autograd is on there only if a graph of it is wanted."""
    if torch.is_grad_enabled():
        raise RuntimeError(SECOND_DERIVATIVE)
