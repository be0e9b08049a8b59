"""Images of a ``datasets.Dataset`` or ``IterableDataset``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from .source import ImageRecord, ImageSource

CAPTION_COLUMNS = ("text", "caption")


class HuggingFaceImages(ImageSource):
    """A column of images, decoded when they are needed.

    Args:
        dataset: a ``datasets.Dataset`` or ``datasets.IterableDataset``.
        image_column: by default the only column of type Image.
        caption_column: by default "text" or "caption", where there is one.

    Raises:
        TypeError: something else than a dataset, several splits for example.
        ValueError: a column that is not there, or not one of type Image.
    """

    def __init__(self, dataset, image_column: str | None = None, caption_column: str | None = None):
        try:
            import datasets
        except ImportError as error:
            raise ImportError("images: datasets need `pip install stitchvm_ext[data]`") from error
        from PIL import Image

        if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            raise TypeError(f"images: expected a Dataset or an IterableDataset, got {type(dataset).__name__}")
        # A stream may not know its columns; its first row shows them.
        features = next(iter(dataset), {}) if dataset.features is None else dataset.features
        typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image | Image.Image)]
        if image_column is None:
            if len(typed) != 1:
                raise ValueError(
                    f"images: expected one column of type Image, got {typed or list(features)}; "
                    "HuggingFaceImages(dataset, image_column=...) names it"
                )
            image_column = typed[0]
        for name in filter(None, (image_column, caption_column)):
            if name not in features:
                raise ValueError(f"images: expected the columns {list(features)}, got {name!r}")
        if caption_column is None:
            caption_column = next((name for name in CAPTION_COLUMNS if name in features), None)
        self.image_column, self.caption_column = image_column, caption_column
        self.original = dataset
        self.dataset = dataset.select_columns(list(filter(None, (image_column, caption_column))))
        if isinstance(features[image_column], datasets.Image):
            self.dataset = self.dataset.cast_column(image_column, datasets.Image(decode=False))

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        for number, row in enumerate(self.dataset.skip(start), start):
            caption = row[self.caption_column] if self.caption_column else None
            image = row[self.image_column]
            yield ImageRecord(_name(number, image), lambda i=image: _open(i), caption)

    def count(self, at_most: int) -> int:
        return min(at_most, len(self.dataset)) if hasattr(self.dataset, "__len__") else super().count(at_most)

    def identity(self) -> dict[str, Any]:
        """By the dataset's fingerprint; a stream has none and is known by its description and its first rows."""
        columns = {"image": self.image_column, "caption": self.caption_column}
        if hasattr(self.original, "_fingerprint"):
            return {"kind": "datasets", "count": len(self.original), "digest": self.original._fingerprint, **columns}
        info = self.original.info
        digest = hashlib.sha256(f"{info.builder_name} {info.config_name} {info.version} {info.splits}".encode())
        for row in islice(self.dataset, 8):
            digest.update(_content(row[self.image_column]))
        return {"kind": "datasets stream", "split": str(self.original.split), "digest": digest.hexdigest(), **columns}


def _name(number: int, image: Any) -> str:
    path = image.get("path") if isinstance(image, dict) else None
    return f"row {number} ({path})" if path else f"row {number}"


def _open(image: Any):
    import datasets

    # What is no file is decoded already, by a stream's own function.
    return datasets.Image().decode_example(image) if isinstance(image, dict) else image


def _content(image: Any) -> bytes:
    if isinstance(image, dict):
        return image["bytes"] or str(image["path"]).encode()
    return image.tobytes()
