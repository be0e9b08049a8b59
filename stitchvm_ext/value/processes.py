"""The processes of one run: those that ``torchrun`` or ``accelerate launch`` started, or this one alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce


def processes(device: torch.device) -> PartialState:
    """accelerate's view of them, with a process group that suits ``device``: gloo for the CPU.

    It is accelerate's ``PartialState`` and no ``Accelerator``, which a caller may have made for purposes of its own and
    which cannot be made twice with different settings.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(cpu=several and device.type == "cpu")


def from_main(state: PartialState, value: Any) -> Any:
    """The main process's ``value``, everywhere."""
    return broadcast_object_list([value])[0] if state.num_processes > 1 else value


def mean_over(state: PartialState, values: torch.Tensor) -> torch.Tensor:
    """The mean over the processes, the same everywhere."""
    return reduce(values, "mean") if state.num_processes > 1 else values
