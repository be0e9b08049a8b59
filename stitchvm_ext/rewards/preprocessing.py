"""Resize and normalise image tensors as the reference libraries do with PIL pictures, but differentiably."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")


def check_preprocess_config(config: dict) -> None:
    """Raises ValueError unless :func:`preprocess` can do what a configuration asks for."""
    for key, known in (("resize_mode", RESIZE_MODES), ("interpolation", INTERPOLATIONS)):
        if config[key] not in known:
            raise ValueError(f"preprocess_cfg[{key!r}]: expected one of {known}, got {config[key]!r}")


def resized_size(height: int, width: int, target: tuple[int, int], mode: str) -> tuple[int, int]:
    """Height and width after the resize and before the crop or padding, rounded as open_clip rounds them."""
    if mode == "squash":
        return target
    if mode == "shortest" and target[0] == target[1]:  # torchvision's Resize(int) truncates the longer side
        short = target[0]
        return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    pick = min if mode == "shortest" else max
    ratio = pick(height / target[0], width / target[1])
    return round(height / ratio), round(width / ratio)


def detector_size(height: int, width: int, shortest: int, longest: int, multiple: int = 16) -> tuple[int, int]:
    """Height and width that YOLOS' processor resizes to: the shorter side ``shortest``, or less so that the longer one
    is at most ``longest``; then both rounded down to a multiple.
    """
    low, high = min(height, width), max(height, width)
    exact: float = shortest
    if high / low * shortest > longest:
        exact = longest * low / high
    short, long = int(round(exact)), int(exact * high / low)
    if low == short and height <= width:  # nothing to resize
        long = high
    short, long = short - short % multiple, long - long % multiple
    return (short, long) if height <= width else (long, short)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _center(x: Tensor, target: tuple[int, int], fill: float, rounding: Callable[[float], int]) -> Tensor:
    """Pad with ``fill`` what is too small and crop what is too large, about the centre."""
    missing = [max(0, side - have) for side, have in zip(target, x.shape[-2:], strict=True)]
    if any(missing):
        x = F.pad(x, (missing[1] // 2, (missing[1] + 1) // 2, missing[0] // 2, (missing[0] + 1) // 2), value=fill)
    top, left = (rounding((have - side) / 2) for side, have in zip(target, x.shape[-2:], strict=True))
    return x[..., top : top + target[0], left : left + target[1]]


def preprocess(images: Tensor, config: dict) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> normalised float32 [B, 3, h, w].

    As PIL does it, the antialiased resize goes first along the rows, then along the columns, and overshoot is clamped
    after each. PIL also rounds to 8 bits after each, so the two differ by up to about 1/255 before normalisation.
    Where the aspect ratio changes, newer Pillow may take the columns first, which moves single overshooting pixels by a
    few 8-bit steps. Differentiable, the clamp's flat parts aside.

    Args:
        config: open_clip's ``preprocess_cfg``: size, mean, std, interpolation, resize_mode, fill_color; and where a
            reference differs from open_clip's own transform:
            ``resize_to``: what the resize aims at, if not ``size``, to which the crop then cuts (DINOv2's 256 -> 224);
            ``crop_floor``: True where an odd surplus is halved downwards (transformers), not to even (torchvision);
            ``clamp``: False where the reference resizes float tensors and keeps the overshoot (HPSv2).
    """
    target = _pair(config["size"])
    x = images.float()
    aim = _pair(config.get("resize_to") or target)
    height, width = resized_size(*x.shape[-2:], aim, config["resize_mode"])
    for step in ((x.shape[-2], width), (height, width)):
        if step != tuple(x.shape[-2:]):
            x = F.interpolate(x, step, mode=config["interpolation"], align_corners=False, antialias=True)
            x = x.clamp(0, 1) if config.get("clamp", True) else x
    x = _center(x, target, config["fill_color"] / 255, math.floor if config.get("crop_floor") else round)
    mean, std = (torch.tensor(config[name], device=x.device).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (x - mean) / std
