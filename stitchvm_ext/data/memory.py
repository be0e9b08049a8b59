"""Images that are in memory already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .source import ImageRecord, ImageSource


class TensorImages(ImageSource):
    """Images [N, 3, H, W], uint8 or float in [0, 1].

    Raises:
        ValueError, TypeError: a tensor that is not this.
    """

    def __init__(self, images: Tensor, captions: Sequence[str] | None = None):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape [N, 3, H, W], got {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images: expected uint8 or floating point, got {images.dtype}")
        if images.is_floating_point() and images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"images: expected floats in [0, 1], got {images.min().item():g}..{images.max().item():g}")
        self.images, self.captions = images, check_captions(captions, len(images))

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        for number in range(start, len(self.images)):
            caption = self.captions[number] if self.captions else None
            yield ImageRecord(f"image {number}", lambda n=number: self.images[n].cpu(), caption)

    def identity(self) -> dict[str, Any]:
        """By the tensor's shape and a thousandth of its entries, spread over all of it."""
        values = self.images.reshape(-1)[:: max(1, self.images.numel() // 100_000)]
        if values.dtype == torch.bfloat16:
            values = values.float()
        digest = hashlib.sha256(values.cpu().numpy().tobytes() + repr(self.captions).encode())
        return {"kind": "tensor", "shape": list(self.images.shape), "digest": digest.hexdigest()}


class PILImages(ImageSource):
    """A list of PIL images.

    Raises:
        TypeError: something else among them; names its position.
    """

    def __init__(self, images: Sequence[Any], captions: Sequence[str] | None = None):
        from PIL import Image

        self.images = list(images)
        for number, image in enumerate(self.images):
            if not isinstance(image, Image.Image):
                raise TypeError(
                    f"images: expected a tensor [N, 3, H, W] or PIL images, got {type(image).__name__} at position "
                    f"{number}"
                )
        self.captions = check_captions(captions, len(self.images))

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        for number in range(start, len(self.images)):
            caption = self.captions[number] if self.captions else None
            yield ImageRecord(f"image {number}", lambda n=number: self.images[n], caption)

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(repr(self.captions).encode())
        for image in self.images:
            digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
        return {"kind": "PIL", "count": len(self.images), "digest": digest.hexdigest()}


def check_captions(captions: Sequence[str] | None, count: int) -> list[str] | None:
    """Raises ValueError unless there is a caption for each of ``count`` images, or none at all."""
    if captions is None:
        return None
    captions = list(captions)
    if len(captions) != count:
        raise ValueError(f"captions: expected {count}, one per image, got {len(captions)}")
    return captions


def as_image_tensor(images: Tensor | Sequence[Any]) -> Tensor:
    """Images [N, 3, H, W], uint8 or float in [0, 1], from such a tensor or from PIL images of one size."""
    if isinstance(images, Tensor):
        return TensorImages(images).images
    source = PILImages(images)
    return source.stack(list(source.records()))
