"""Pictures on disk as tensors of one size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_files(folder: str | Path) -> list[Path]:
    """The pictures below a folder, sorted by path. Raises OSError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"images: expected a folder of pictures, got {folder}, which is not there")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise OSError(f"images: expected pictures ({', '.join(SUFFIXES)}) in {folder}, found none")
    return files


def read_image(path: str | Path, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W]: cropped about its centre to the aspect ratio of ``size`` (H, W), then resized.

    Raises:
        OSError: a file that is missing or cannot be read; names it.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for broken files
        raise OSError(f"images: {path} cannot be read: {error}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def read_images(paths: Sequence[str | Path], size: tuple[int, int]) -> Tensor:
    """uint8 [N, 3, H, W], see :func:`read_image`."""
    return torch.stack([read_image(path, size) for path in paths])
