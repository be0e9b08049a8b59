"""The processes of one run: those that ``torchrun`` or ``accelerate launch`` started, or this one alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce


def processes(device: torch.device) -> PartialState:
    """accelerate's view of them, with a process group that suits ``device``: gloo for the CPU.

    It is accelerate's ``PartialState`` and no ``Accelerator``, which a caller may have made for purposes of its own and
    which cannot be made twice with different settings.

    Raises:
        ValueError: one of several processes has its models on another's GPU.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    state = PartialState(cpu=several and device.type == "cpu")
    if several and device.type == "cuda" and device != state.device:
        raise ValueError(
            f"pipe: expected it on {state.device}, the device of process {state.process_index}, got {device}"
        )
    return state


def from_main(state: PartialState, value: Any) -> Any:
    """The main process's ``value``, everywhere."""
    return broadcast_object_list([value])[0] if state.num_processes > 1 else value


def mean_over(state: PartialState, values: torch.Tensor) -> torch.Tensor:
    """The mean over the processes, the same everywhere."""
    return reduce(values, "mean") if state.num_processes > 1 else values


def sum_over(state: PartialState, values: torch.Tensor) -> torch.Tensor:
    """The sum over the processes, the same everywhere."""
    return reduce(values, "sum") if state.num_processes > 1 else values


def gather_rows(state: PartialState, rows: list[Any]) -> list[Any]:
    """The rows of all processes, those of the first before those of the second, the same everywhere."""
    return gather_object(rows) if state.num_processes > 1 else rows


def share_of(state: PartialState, count: int) -> range:
    """Which of ``count`` rows this process has: neighbours, as evenly many as can be."""
    size, more = divmod(count, state.num_processes)
    start = state.process_index * size + min(state.process_index, more)
    return range(start, start + size + (state.process_index < more))
