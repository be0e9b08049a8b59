"""The ways in which one module can be run: with adapters, checkpointed, as its authors wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LORA_RANK = 32
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip


@contextmanager
def add_lora(denoiser: nn.Module) -> Iterator[list[Tensor]]:
    """Adapters of rank 32 on all attention projections, which are not merged (METHOD.md §6); yields their weights."""
    weights, adapted = [], []
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(LORA_TARGETS):
            down = torch.empty(LORA_RANK, module.in_features, dtype=module.weight.dtype, requires_grad=True)
            up = torch.empty(module.out_features, LORA_RANK, dtype=module.weight.dtype, requires_grad=True)
            module.forward = _Adapted(module, down, up)
            weights += [down, up]
            adapted.append(module)
    try:
        yield weights
    finally:
        for module in adapted:
            del module.forward


class _Adapted:
    def __init__(self, linear: nn.Linear, down: Tensor, up: Tensor):
        self.linear, self.down, self.up = linear, down, up

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight, self.linear.bias) + 2 * F.linear(F.linear(x, self.down), self.up)


@contextmanager
def checkpointing(module: nn.Module, enabled: bool) -> Iterator[None]:
    """diffusers' own gradient checkpointing of a denoiser's blocks or of an autoencoder's, where the class knows it
    (the autoencoders of HunyuanImage and Qwen-Image do not).
    """
    enabled = enabled and module._supports_gradient_checkpointing
    if enabled:
        module.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))  # takes keywords too
    try:
        yield
    finally:
        if enabled:
            module.disable_gradient_checkpointing()


@contextmanager
def as_written(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the ``with`` these blocks run their own forward, fused neither by this library nor by PyTorch."""
    blocks = [block for block in blocks if "forward" not in block.__dict__]
    for block in blocks:
        block.forward = type(block).forward.__get__(block)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for block in blocks:
            del block.forward
