"""Rows of tensors on disk, in safetensors shards that are read a row at a time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tensor_files import write_partial

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def digest_of(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class ShardWriter:
    """Writes a folder of shards 00000.safetensors, 00001.safetensors, ... of ``shard_size`` rows, the last of the rest.

    A shard is written to a temporary name, then renamed, and carries the digest of ``identity``. What an interrupted
    run left is therefore found again (:meth:`has`), and what belongs to something else is not taken for it.

    Args:
        identity: JSON-ready, everything that the rows follow from; what else is in the folder is replaced.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], shard_size: int):
        self.folder, self.shard_size = folder, shard_size
        self.identity = json.loads(json.dumps(identity, default=str))
        self.digest = digest_of({**self.identity, "shard_size": shard_size, "format_version": FORMAT_VERSION})

    def is_complete(self) -> bool:
        """Whether a folder with this identity was finished."""
        try:
            return json.loads((self.folder / MANIFEST).read_text())["digest"] == self.digest
        except (OSError, ValueError, KeyError):
            return False

    def has(self, shard: int) -> bool:
        """Whether this shard is there already."""
        try:
            return _read_header(shard_path(self.folder, shard))["digest"] == self.digest
        except OSError:
            return False

    def write(self, shard: int, rows: dict[str, Tensor], texts: list[str | None] | None = None) -> None:
        """Write a shard of tensors [rows, ...], with a text per row if there are any."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = shard_path(self.folder, shard)
        write_partial(path, rows, {"digest": self.digest, "texts": json.dumps(texts)}).replace(path)

    def finish(self, count: int) -> None:
        """All ``count`` rows are there: drop shards of another identity and write manifest.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = -(-count // self.shard_size)
        for path in self.folder.glob("*.safetensors*"):
            if path not in {shard_path(self.folder, n) for n in range(shards)}:
                path.unlink()
        manifest = {
            "format_version": FORMAT_VERSION,
            "digest": self.digest,
            "identity": self.identity,
            "count": count,
            "shard_size": self.shard_size,
            "tensors": _read_header(shard_path(self.folder, 0))["tensors"],
        }
        partial = self.folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(manifest, indent=1))
        partial.replace(self.folder / MANIFEST)


class ShardedTensors:
    """A finished folder of shards, memory-mapped: a row is read when it is asked for.

    Attributes:
        digest: of what the rows follow from.
        names: of the tensors.

    Raises:
        OSError: the folder was not finished, or is of another format.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise OSError(f"folder: expected shards and their {MANIFEST} in {folder}, got: {error}") from error
        if manifest["format_version"] != FORMAT_VERSION:
            raise OSError(
                f"folder: expected format_version {FORMAT_VERSION} in {folder}, got {manifest['format_version']}"
            )
        self.digest, self.count, self.shard_size = (manifest[k] for k in ("digest", "count", "shard_size"))
        self.names = tuple(manifest["tensors"])
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.count

    def _shard(self, number: int):
        if number not in self._open:
            self._open[number] = _open_shard(shard_path(self.folder, number))
        return self._open[number]

    def row(self, number: int) -> dict[str, Tensor]:
        """The tensors [1, ...] of a row."""
        shard, offset = divmod(number, self.shard_size)
        return {name: self._shard(shard).get_slice(name)[offset : offset + 1] for name in self.names}

    def rows(self, numbers: Tensor) -> dict[str, Tensor]:
        """The tensors [B, ...] of some rows, in their stored dtype."""
        found = [self.row(n) for n in numbers.tolist()]
        return {name: torch.cat([row[name] for row in found]) for name in self.names}

    def texts(self) -> list[str | None]:
        """The text of every row, None where it has none."""
        found: list[str | None] = []
        for shard in range(-(-self.count // self.shard_size)):
            texts = json.loads(self._shard(shard).metadata()["texts"])
            found += texts or [None] * min(self.shard_size, self.count - len(found))
        return found


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _open_shard(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise OSError(f"folder: the shard {path} cannot be read: {error}") from error


def _read_header(path: Path) -> dict[str, Any]:
    """Digest of a shard, and dtype and shape of its rows."""
    file = _open_shard(path)
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return {
        "digest": (file.metadata() or {}).get("digest"),
        "tensors": {n: {"dtype": s.get_dtype(), "shape": list(s.get_shape())[1:]} for n, s in slices.items()},
    }
