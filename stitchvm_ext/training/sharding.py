"""Frozen weights that are split over the processes by FSDP: a block is whole only where and while it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def shard_blocks(denoiser: nn.Module, blocks: Sequence[nn.Module], device: torch.device, processes: int) -> None:
    """Split every block's frozen parameters by rows over the processes, block by block; each moves its own to
    ``device``. Adapters stay whole.

    Views of the denoiser that were made before share its modules' hooks and parameters, and so run split as well; none
    can be made afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    adapters = {p for name, p in denoiser.named_parameters() if ".lora_" in name}
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)


def is_sharded(module: nn.Module) -> bool:
    return any(hasattr(p, "full_tensor") for p in module.parameters())  # a DTensor, whose import takes a second


def whole(weight: Tensor) -> Tensor:
    """A parameter that may be split, put together; all processes ask for it at the same time."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
