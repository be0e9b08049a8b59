"""Prompts to train on, in an order that follows from a seed and can be entered anywhere."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..sampling.checks import as_prompts

COLUMNS = ("prompt", "text", "caption")


class PromptDataset:
    """Texts that are drawn without end: a fresh permutation of all of them every epoch.

    Args:
        prompts: texts, the path of a text file with one per line (empty lines aside), or a ``datasets.Dataset``.
        column: of the dataset; by default "prompt", "text" or "caption".
        seed: of the order.

    Raises:
        OSError: the file is missing or cannot be read as UTF-8.
        TypeError: something else, or texts that are none.
        ValueError: no text, or no such column.
    """

    def __init__(self, prompts: Any, column: str | None = None, seed: int = 0):
        self.texts, self.seed = _read(prompts, column), seed

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def digest(self) -> str:
        """Of the texts and their places."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()

    def at(self, position: int, count: int) -> list[str]:
        """The texts number ``position``, ``position + 1`` ... of the endless sequence, ``count`` of them."""
        places = (divmod(number, len(self.texts)) for number in range(position, position + count))
        return [self.texts[_order(self.seed, epoch, len(self.texts))[place]] for epoch, place in places]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, count)).permutation(count)


def _read(prompts: Any, column: str | None) -> list[str]:
    if isinstance(prompts, str | Path):
        return _read_file(Path(prompts))
    if type(prompts).__module__.split(".")[0] == "datasets":
        return _read_dataset(prompts, column)
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts: expected texts, a text file or a datasets.Dataset, got {type(prompts).__name__}")
    return as_prompts("prompts", list(prompts))


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"prompts: expected a text file with one prompt per line, found none at {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise OSError(f"prompts: expected text in UTF-8, got other bytes in {path}: {error}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"prompts: expected one prompt per line, got an empty file: {path}")
    return texts


def _read_dataset(dataset: Any, column: str | None) -> list[str]:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"prompts: expected a datasets.Dataset, got {type(dataset).__name__} (of several splits take one, of a "
            "stream its first rows: Dataset.from_list(list(stream.take(10000))))"
        )
    names = dataset.column_names
    column = column or next((name for name in COLUMNS if name in names), None)
    if column not in names:
        raise ValueError(f"prompts: expected a column {column or ' or '.join(COLUMNS)}, got {names}")
    return as_prompts("prompts", list(dataset[column]))
