"""Which source reads what a caller calls images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import ImageFiles
from .hugging_face import HuggingFaceImages
from .memory import PILImages, TensorImages
from .source import ImageSource
from .web import WebDatasetImages


def as_image_source(images: Any, size: int | Sequence[int] | None = None) -> ImageSource:
    """A source of images: a tensor [N, 3, H, W]; PIL images; a folder; paths of image files; a ``datasets.Dataset`` or
    ``IterableDataset`` with a column of images; webdataset shards (paths that end in .tar, braces allowed); or an
    :class:`ImageSource`.

    Args:
        size: (height, width) that every image is brought to, or one number for squares; None keeps a source's own.

    Raises:
        TypeError, ValueError, OSError: none of these; says what was expected.
    """
    source = _detect(images)
    return source if size is None else source.resized(size)


def _detect(images: Any) -> ImageSource:
    if isinstance(images, ImageSource):
        return images
    if isinstance(images, Tensor):
        return TensorImages(images)
    if isinstance(images, str | Path):
        return WebDatasetImages(images) if _is_shard(images) else ImageFiles(images)
    if type(images).__module__.split(".")[0] == "datasets":
        return HuggingFaceImages(images)
    images = list(images)
    if images and all(isinstance(image, str | Path) for image in images):
        shards = [_is_shard(image) for image in images]
        if any(shards) and not all(shards):
            raise ValueError("images: expected image files or webdataset shards, got paths of both")
        return WebDatasetImages(images) if all(shards) else ImageFiles(images)
    return PILImages(images)


def _is_shard(path: str | Path) -> bool:
    return str(path).endswith(".tar")
