"""Checks that stop a run, or speak up, before it is spoilt."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

MAX_DRIFT = 0.5  # adapters that change the weights by more than half of themselves have left the model


def check_finite(iteration: int, **tensors: Tensor | float) -> None:
    """Raises FloatingPointError that names the iteration and the first tensor with a number that is not finite."""
    for name, tensor in tensors.items():
        finite = math.isfinite(tensor) if isinstance(tensor, float) else bool(torch.isfinite(tensor).all())
        if not finite:
            raise FloatingPointError(f"training: {name} is not finite at iteration {iteration}")


def check_gradients(iteration: int, parameters: dict[str, nn.Parameter]) -> None:
    """Raises FloatingPointError that names the iteration and the first parameter whose gradient is not finite."""
    check_finite(iteration, **{f"the gradient of {n}": p.grad for n, p in parameters.items() if p.grad is not None})


def warn_if_drifted(iteration: int, drift: float) -> None:
    if drift > MAX_DRIFT:
        warnings.warn(
            f"training: at iteration {iteration} the adapter changes the weights by {drift:.0%} of their norm; a lower "
            "learning rate or a higher kl_weight keeps it nearer to the model",
            stacklevel=2,
        )


def warn_constant(iteration: int) -> None:
    warnings.warn(
        f"training: all rewards of every group are equal at iteration {iteration}, which is skipped; is the reward "
        "saturated, or does it not see these images?",
        stacklevel=2,
    )
