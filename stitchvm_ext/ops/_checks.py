"""Checks of arguments that every op shares. Messages name the op, the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_GRID_SIDE = 32767  # csrc/common/resample_tokens.h

SECOND_DERIVATIVE = (
    "{op}: the compiled kernels have no second derivative; call it with backend='reference' to differentiate twice"
)


def shape_of(t: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in t.shape) + "]"


def check_tokens(op: str, x: Tensor, name: str = "x") -> None:
    """x must be a strided floating-point [B, N, C] tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name}: expected a floating-point dtype, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name}: expected a strided (dense) tensor, got layout {x.layout}")
    if x.dim() != 3:
        raise ValueError(f"{op}: {name}: expected shape [B, N, C], got {shape_of(x)}")


def check_like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """t must be a tensor with the dtype and device of x."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(t).__name__}")
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name}: expected the dtype of x, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name}: expected the device of x, {x.device}, got {t.device}")


def check_grid(op: str, name: str, grid: tuple[int, int]) -> tuple[int, int]:
    """grid must be two integers in [1, MAX_GRID_SIDE]; returned as a tuple of int."""
    if not isinstance(grid, tuple | list | torch.Size) or len(grid) != 2:
        raise ValueError(f"{op}: {name}: expected two integers (height, width), got {grid!r}")
    for side in grid:
        if isinstance(side, bool) or not isinstance(side, int):
            raise TypeError(f"{op}: {name}: expected two integers (height, width), got {grid!r}")
        if not 1 <= side <= MAX_GRID_SIDE:
            raise ValueError(f"{op}: {name}: expected sides in [1, {MAX_GRID_SIDE}], got {tuple(grid)}")
    return grid[0], grid[1]
