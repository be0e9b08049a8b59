"""Prompts and seeds: what a file or a list of texts says should be drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .checks import check_count

SEED_END = 2**63


@dataclass(frozen=True)
class Prompt:
    """A text to be drawn.

    Attributes:
        prompt: the text.
        negative_prompt: of classifier-free guidance; None is the run's.
        seed: of its first image, the further ones have the next; None continues the run's.

    Raises:
        TypeError, ValueError: an attribute that is none of this.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None

    def __post_init__(self):
        if not isinstance(self.prompt, str):
            raise TypeError(f"prompt: expected a text, got {self.prompt!r:.80}")
        if not isinstance(self.negative_prompt, str | None):
            raise TypeError(f"negative_prompt: expected a text, got {self.negative_prompt!r:.80}")
        if self.seed is not None:
            check_seed(self.seed)


@dataclass(frozen=True)
class Sample:
    """One image to be drawn: the ``index``-th of its run."""

    index: int
    prompt: str
    negative_prompt: str
    seed: int

    @property
    def generator(self) -> torch.Generator:
        """A fresh one; of the CPU, whose numbers are the same on every device."""
        return torch.Generator().manual_seed(self.seed)


def check_seed(seed) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
    if not 0 <= seed < SEED_END:
        raise ValueError(f"seed: expected 0 to 2^63 - 1, got {seed}")


def read_prompts(prompts: str | Path | Sequence[str | Prompt]) -> list[Prompt]:
    """The prompts of a list or a file.

    Args:
        prompts: texts or :class:`Prompt` objects; or the path of a UTF-8 file, a prompt per line: as it stands, without
            the spaces around it, or, in a .jsonl file, ``{"prompt": ..., "negative_prompt": ..., "seed": ...}`` of
            which the last two may be left out. Blank lines are passed over.

    Raises:
        OSError: no such file.
        TypeError, ValueError: no prompt, or one that is none of this; names its position or line.
    """
    if not isinstance(prompts, str | Path):
        if not isinstance(prompts, Sequence):
            raise TypeError(f"prompts: expected a file or a list of texts, got {type(prompts).__name__}")
        found = [p if isinstance(p, Prompt) else _named(f"prompts: number {k}", p) for k, p in enumerate(prompts)]
    else:
        path = Path(prompts)
        if not path.is_file():
            raise OSError(f"prompts: expected a file or a list of texts, got {str(prompts)!r}, which is no file")
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts: expected a text file in UTF-8, got {path}: {error}") from error
        read = _json_line if path.suffix == ".jsonl" else _named
        found = [read(f"prompts: line {n} of {path}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"prompts: expected at least one, got none{f' in {prompts}' if prompts else ''}")
    return found


def _named(place: str, *text, **entries) -> Prompt:
    """A Prompt whose errors say where it stands."""
    try:
        return Prompt(*text, **entries)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error}") from None


def _json_line(place: str, line: str) -> Prompt:
    known = [f.name for f in fields(Prompt)]
    try:
        entries = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: expected a JSON object, got {line[:80]!r}: {error}") from None
    if not isinstance(entries, dict) or "prompt" not in entries or not set(entries) <= set(known):
        raise ValueError(f'{place}: expected a JSON object with "prompt" and nothing but {known}, got {line[:80]!r}')
    return _named(place, **entries)


def expand_prompts(prompts: Sequence[Prompt], images_per_prompt: int, seed: int, negative_prompt: str) -> list[Sample]:
    """The images of a run, those of a prompt next to each other. Image number k has the seed ``seed + k``, unless its
    prompt has one of its own.
    """
    check_count("images_per_prompt", images_per_prompt)
    check_seed(seed)
    if not isinstance(negative_prompt, str):
        raise TypeError(f"negative_prompt: expected a text, got {type(negative_prompt).__name__}")
    samples = []
    for number, prompt in enumerate(prompts):
        first = number * images_per_prompt
        own = seed + first if prompt.seed is None else prompt.seed
        negative = negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
        samples += [Sample(first + k, prompt.prompt, negative, own + k) for k in range(images_per_prompt)]
    check_seed(max(sample.seed for sample in samples))
    return samples


def in_batches(samples: Sequence[Sample], images_per_batch: int) -> list[list[Sample]]:
    """Batches that depend on the samples' positions alone, so that whoever draws one draws the same."""
    check_count("images_per_batch", images_per_batch)
    return [list(samples[k : k + images_per_batch]) for k in range(0, len(samples), images_per_batch)]


def as_entries(prompts: Sequence[Prompt]) -> list[dict]:
    """JSON-ready, without what is not set."""
    return [{name: x for name, x in asdict(prompt).items() if x is not None} for prompt in prompts]
