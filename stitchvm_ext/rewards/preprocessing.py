"""Resize and normalise image tensors as open_clip's own transform does with PIL pictures, but differentiably."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")


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


def _center(x: Tensor, target: tuple[int, int], fill: float) -> Tensor:
    """Pad with ``fill`` what is too small and crop what is too large, about the centre."""
    missing = [max(0, side - have) for side, have in zip(target, x.shape[-2:], strict=True)]
    if any(missing):
        x = F.pad(x, (missing[1] // 2, (missing[1] + 1) // 2, missing[0] // 2, (missing[0] + 1) // 2), value=fill)
    top, left = (int(round((have - side) / 2)) for side, have in zip(target, x.shape[-2:], strict=True))
    return x[..., top : top + target[0], left : left + target[1]]


def preprocess(images: Tensor, config: dict) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> normalised float32 [B, 3, h, w].

    As PIL does it, the antialiased resize goes first along the rows, then along the columns, and overshoot is clamped
    after each. PIL also rounds to 8 bits after each, so the two differ by up to about 1/255 before normalisation.
    Where the aspect ratio changes, newer Pillow may take the columns first, which moves single overshooting pixels by a
    few 8-bit steps. Differentiable, the clamp's flat parts aside.

    Args:
        config: open_clip's ``preprocess_cfg``: size, mean, std, interpolation, resize_mode, fill_color.
    """
    size, mode = config["size"], config["resize_mode"]
    target = (size, size) if isinstance(size, int) else tuple(size)
    x = images.float()
    height, width = resized_size(*x.shape[-2:], target, mode)
    for step in ((x.shape[-2], width), (height, width)):
        if step != tuple(x.shape[-2:]):
            x = F.interpolate(x, step, mode=config["interpolation"], align_corners=False, antialias=True).clamp(0, 1)
    x = _center(x, target, config["fill_color"] / 255)
    mean, std = (torch.tensor(config[name], device=x.device).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (x - mean) / std
