"""Image files: a folder, or a list of paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .source import ImageRecord, ImageSource

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
METADATA = "metadata.jsonl"


class ImageFiles(ImageSource):
    """Files in the order given, or all of a folder and its subfolders, sorted by path.

    A caption is the text file of the same name beside the image (``cat.txt`` for ``cat.jpg``), or the ``text`` of the
    image's line in the folder's metadata.jsonl, whose lines are ``{"file_name": ..., "text": ...}`` as ``datasets`` has
    them.

    Raises:
        OSError: a path that does not exist, or a folder without images.
        ValueError: a line of metadata.jsonl that is not as above.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]):
        self.root: Path | None = None
        if isinstance(paths, str | Path):
            self.root = Path(paths)
            if not self.root.is_dir():
                raise OSError(f"images: expected a folder of images, got {paths}, which is not there")
            self.paths = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not self.paths:
                raise OSError(f"images: expected image files ({', '.join(EXTENSIONS)}) in {paths}, got none")
        else:
            self.paths = [Path(p) for p in paths]
            missing = next((p for p in self.paths if not p.is_file()), None)
            if missing is not None:
                raise OSError(f"images: expected image files, got {missing}, which is not there")
        self.texts = self._metadata()

    def _metadata(self) -> dict[str, str]:
        """Captions of metadata.jsonl by path relative to the folder."""
        if self.root is None or not (self.root / METADATA).is_file():
            return {}
        texts = {}
        for number, line in enumerate((self.root / METADATA).read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                texts[row["file_name"]] = row["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'images: expected {{"file_name": ..., "text": ...}} in line {number} of {self.root / METADATA}, '
                    f"got {line[:80]!r}"
                ) from error
        return texts

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if self.root else str(path)

    def _caption(self, path: Path) -> str | None:
        if self._name(path) in self.texts:
            return self.texts[self._name(path)]
        beside = path.with_suffix(".txt")
        return beside.read_text(encoding="utf-8").strip() if beside.is_file() else None

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        from PIL import Image

        for path in self.paths[start:]:
            yield ImageRecord(str(path), lambda p=path: Image.open(p), self._caption(path))

    def count(self, at_most: int) -> int:
        return min(at_most, len(self.paths))

    def identity(self) -> dict[str, Any]:
        """By names, lengths and times of change of the files and their captions."""
        digest = hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode())
        for path in self.paths:
            for file in (path, path.with_suffix(".txt")):
                if file.is_file():
                    stat = file.stat()
                    digest.update(f"{self._name(file)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return {"kind": "files", "count": len(self.paths), "digest": digest.hexdigest()}
