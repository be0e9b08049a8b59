"""The one interface through which images are read: a stream of records that are decoded when they are needed."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageRecord:
    """One image that is not decoded yet.

    Attributes:
        name: by which errors call it.
        open: returns a PIL image, or a tensor [3, H, W] as :class:`TensorImages` holds it.
        caption: the image's text, if it has one.
    """

    name: str
    open: Callable[[], Any]
    caption: str | None = None

    def __post_init__(self):
        if not isinstance(self.caption, str | None):
            raise TypeError(f"images: expected text as the caption of {self.name}, got {type(self.caption).__name__}")


class ImageSource(ABC):
    """A fixed sequence of images, read in order and never held in memory as a whole.

    Attributes:
        size: (height, width) in pixels that every image is brought to: resized to cover it and cropped about the
            centre. None leaves images as they are; they must then have one size.
    """

    size: tuple[int, int] | None = None

    @abstractmethod
    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        """The records from position ``start`` on, always in the same order. Passing one over does not decode it."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON-ready: what tells these images from others, without decoding all of them."""

    def resized(self, size: int | Sequence[int] | None) -> ImageSource:
        """The same images at another size: (height, width), or one number for squares."""
        if isinstance(size, int):
            size = (size, size)
        if size is not None and (len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size)):
            raise ValueError(f"size: expected (height, width) in pixels or one number, got {size!r}")
        other = copy.copy(self)
        other.size = None if size is None else tuple(size)
        other.__dict__.pop("image_size", None)
        return other

    def count(self, at_most: int) -> int:
        """How many images there are, counted no further than ``at_most``."""
        return sum(1 for _ in islice(self.records(), at_most))

    @cached_property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what :meth:`load` returns: ``size``, or that of the first image."""
        if self.size is not None:
            return self.size
        return tuple(_decode(self._first).shape[-2:])

    @cached_property
    def _first(self) -> ImageRecord:
        first = next(self.records(), None)
        if first is None:
            raise ValueError("images: expected at least one image, got none")
        return first

    def load(self, records: Sequence[ImageRecord]) -> Tensor:
        """The images of some records, float32 [B, 3, H, W] in [0, 1]; raises as :meth:`stack`."""
        return as_unit_images(self.stack(records))

    def stack(self, records: Sequence[ImageRecord]) -> Tensor:
        """The images of some records [B, 3, H, W], uint8 or float in [0, 1], decoded by several threads.

        Raises:
            OSError: an image that cannot be read; names it.
            ValueError: an image of another size than the first one, and no ``size`` to bring it to; names both.
        """
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = list(pool.map(lambda record: _decode(record, self.size), records))
        for record, image in zip(records, images, strict=True):
            if tuple(image.shape[-2:]) != self.image_size:
                raise ValueError(
                    f"images: expected images of one size, got {_text(image.shape[-2:])} for {record.name} and "
                    f"{_text(self.image_size)} for {self._first.name}; size=(height, width) brings them to one"
                )
        return torch.stack(images)


def as_unit_images(images: Tensor) -> Tensor:
    """uint8 in 0..255 or float in [0, 1] -> float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _text(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"


def _decode(record: ImageRecord, size: tuple[int, int] | None = None) -> Tensor:
    """An image as a tensor [3, H, W], upright, in RGB."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        image = record.open()
        if isinstance(image, Image.Image):
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # each of PIL's file formats has errors of its own
        raise OSError(f"images: {record.name} cannot be read as an image: {error}") from error
    if isinstance(image, Tensor):
        if size not in (None, tuple(image.shape[-2:])):
            raise ValueError(f"size: expected the tensor's own {_text(image.shape[-2:])} or None, got {_text(size)}")
        return image
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"images: expected 8 bits per channel, got {record.name} with mode {image.mode}")
    image = image.convert("RGB")
    if size is not None:
        image = ImageOps.fit(image, size[::-1], method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
