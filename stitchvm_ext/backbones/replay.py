"""Run the denoiser's first blocks once, and go on from there later.

A value that was asked of a latent has run the first blocks of the pass that the next sampling step makes on it. What
those blocks returned is kept, and the pass replays it in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..fused.function import is_compiled
from ..fused.step_graph import StepGraph
from ..offload import skipped


class Replayed:
    """Stands in for a block's forward: returns what the block returned before."""

    def __init__(self, output: Any):
        self.output = output

    def __call__(self, *args, **kwargs):
        return self.output


def can_replay(denoiser: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Not where a compiled program or a CUDA graph has taken the blocks' place."""
    graph = isinstance(denoiser.__dict__.get("forward"), StepGraph)
    return not (graph or is_compiled(denoiser) or any(is_compiled(block) for block in blocks))


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Within the ``with``, what each block returns goes into the list, in running order."""
    outputs: list[Any] = []
    handles = [block.register_forward_hook(lambda m, a, output: outputs.append(output)) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Within the ``with``, these blocks compute nothing and return the given outputs."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, output in zip(blocks, outputs, strict=True):
            block.forward = Replayed(output)
        with skipped(blocks):
            yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            del block.forward
            if old is not None:
                block.forward = old


def map_outputs(change: Callable[..., Tensor], *outputs: Any) -> Any:
    """``change`` on the tensors of blocks' outputs of one structure; what is no tensor stays as in the first."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return change(*outputs)
    if isinstance(first, tuple | list):
        return type(first)(map_outputs(change, *parts) for parts in zip(*outputs, strict=True))
    return first


def rows_of(outputs: Sequence[Any], index: Tensor) -> list[Any]:
    return [map_outputs(lambda t: t[index.to(t.device)], output) for output in outputs]


def cat_rows(parts: Sequence[Sequence[Any]]) -> list[Any]:
    return [map_outputs(lambda *t: torch.cat(t), *outputs) for outputs in zip(*parts, strict=True)]
