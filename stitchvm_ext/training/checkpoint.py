"""Checkpoints: a folder each, whole or not there at all."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1
STATE = "state.pt"


def save_checkpoint(folder: Path, iteration: int, state: dict[str, Any], keep: int, write_adapter) -> Path:
    """Write ``folder/iteration_000123`` under a temporary name, rename it, then remove all but the newest ``keep``.

    Args:
        state: tensors, numbers and texts in dictionaries and lists.
        write_adapter: called with the unfinished folder, to add the adapter's file.

    Raises:
        OSError: the disk is full or not writable; the checkpoints that are there stay as they are.
    """
    path = folder / f"iteration_{iteration:06d}"
    partial = folder / f".{path.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with (partial / STATE).open("wb") as file:
            torch.save({**state, "format_version": FORMAT_VERSION, "iteration": iteration}, file)
            file.flush()
            os.fsync(file.fileno())
        write_adapter(partial)
        if path.exists():  # of a run that went back to an older one
            shutil.rmtree(path)
        partial.rename(path)
    except (OSError, RuntimeError) as error:  # torch's writer has an error of its own
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint: {path} could not be written ({error})") from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest last."""
    return sorted(path for path in folder.glob("iteration_*") if (path / STATE).is_file())


def load_checkpoint(folder: Path, run: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The state of the newest checkpoint that can be read; None where there is none.

    Raises:
        OSError: none can be read, or it is of another format or of another run; says what differs.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            state = torch.load(path / STATE, weights_only=True, map_location=device)
        except Exception as error:  # a damaged file fails in zipfile, pickle or torch
            warnings.warn(f"checkpoint: {path} cannot be read ({error}); trying the one before", stacklevel=2)
            continue
        version = state.get("format_version")
        if version != FORMAT_VERSION:
            raise OSError(f"checkpoint: expected format version {FORMAT_VERSION}, got {version} in {path}")
        saved = state["run"]
        differ = [n for n in {**run, **saved} if run.get(n) != saved.get(n)]
        other = [f"{n}: expected {run.get(n)!r}, got {saved.get(n)!r}" for n in differ]
        if other:
            raise OSError(f"checkpoint: {path} belongs to another run ({'; '.join(other)}); remove it to start anew")
        return state
    if paths:
        raise OSError(f"checkpoint: none of those in {folder} can be read")
    return None
