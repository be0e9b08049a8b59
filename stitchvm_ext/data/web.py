"""Images in webdataset shards: tar files read from front to back."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .files import EXTENSIONS
from .source import ImageRecord, ImageSource


class WebDatasetImages(ImageSource):
    """Samples of tar files, as the package webdataset groups them: files that differ in their extension alone.

    A caption is the sample's ``txt``, or ``caption`` or ``text`` in its ``json``.

    Args:
        shards: paths of .tar files; a path may have braces, "shards/{000..009}.tar".

    Raises:
        ImportError: the package webdataset is missing.
        OSError: a file that is not there.
    """

    def __init__(self, shards: str | Path | Sequence[str | Path]):
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise ImportError("images: webdataset shards need `pip install stitchvm_ext[data]`") from error
        shards = [shards] if isinstance(shards, str | Path) else list(shards)
        self.shards = [Path(path) for shard in shards for path in expand_urls(str(shard))]
        missing = next((path for path in self.shards if not path.is_file()), None)
        if missing is not None:
            raise OSError(f"images: expected webdataset shards, got {missing}, which is not there")

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        """Raises ValueError for a sample without an image, OSError for a shard that is no tar file."""
        return islice(self._records(), start, None)

    def _records(self) -> Iterator[ImageRecord]:
        import webdataset

        for shard in self.shards:  # one at a time, to name the one that is broken
            samples = webdataset.WebDataset(
                [str(shard)], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
            )
            try:
                for sample in samples:
                    yield _record(shard, sample)
            except (OSError, EOFError, tarfile.TarError) as error:
                raise OSError(f"images: {shard} cannot be read as a webdataset shard: {error}") from error

    def identity(self) -> dict[str, Any]:
        """By names, lengths and times of change of the shards."""
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.shards]
        return {
            "kind": "webdataset",
            "shards": len(self.shards),
            "digest": hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
        }


def _record(shard: Path, sample: dict[str, Any]) -> ImageRecord:
    from PIL import Image

    name = f"{shard}: {sample['__key__']}"
    found = [ending for ending in sample if f".{ending.rsplit('.')[-1].lower()}" in EXTENSIONS]
    if not found:
        endings = sorted(ending for ending in sample if not ending.startswith("__"))
        raise ValueError(f"images: expected an image in the sample {name}, got {endings}")
    return ImageRecord(name, lambda: Image.open(io.BytesIO(sample[found[0]])), _caption(name, sample))


def _caption(name: str, sample: dict[str, Any]) -> str | None:
    if "txt" in sample:
        return sample["txt"].decode("utf-8").strip()
    if "json" not in sample:
        return None
    try:
        document = json.loads(sample["json"])
    except ValueError as error:
        raise ValueError(f"images: the json of the sample {name} cannot be read: {error}") from error
    return document.get("caption", document.get("text")) if isinstance(document, dict) else None
