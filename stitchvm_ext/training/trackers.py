"""Trackers of a run: accelerate's own classes, which need no ``Accelerator``."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

PROJECT = "stitchvm"
WANDB_ID = "wandb_id.txt"


def choose_trackers(trackers: Sequence[str | GeneralTracker] | None) -> tuple[str | GeneralTracker, ...]:
    """These trackers; for None TensorBoard's where it is installed.

    Raises:
        ImportError: the package of one of them is not installed.
        ValueError: accelerate knows no such tracker.
    """
    installed = sorted(map(str, get_available_trackers()))
    if trackers is None:
        return tuple(name for name in installed if name == "tensorboard")
    for name in trackers:
        if isinstance(name, GeneralTracker):
            continue
        if name not in LOGGER_TYPE_TO_CLASS:
            known = f"names among {sorted(LOGGER_TYPE_TO_CLASS)} or instances of accelerate's GeneralTracker"
            raise ValueError(f"trackers: expected a list of {known}, got {trackers!r}")
        if name in LoggerType and name not in installed:
            raise ImportError(f"trackers: the package of {name!r} is not installed; there is {installed or 'none'}")
    return tuple(trackers)


def start_trackers(
    trackers: Sequence[str | GeneralTracker], folder: Path, iterations: int, settings: Mapping[str, Any]
) -> list[GeneralTracker]:
    """Begin to track, or go on in the same log.

    TensorBoard hides the steps that a resumed run writes again. Weights & Biases goes on in the same run and ignores
    such steps, which were the same. Other trackers that are named begin a run of their own; an instance does what it
    was made for.

    Args:
        folder: of the run; TensorBoard's is in it.
        iterations: done so far, -1 for a run that begins.
        settings: of the run, which the trackers get where it begins.
    """
    started = []
    for tracker in trackers:
        if not isinstance(tracker, GeneralTracker):
            kind, options = LOGGER_TYPE_TO_CLASS[tracker], {}
            place = (PROJECT, str(folder)) if kind.requires_logging_directory else (PROJECT,)
            if tracker == "tensorboard":
                place, options = ("tensorboard", str(folder)), {"purge_step": iterations + 1}
            elif tracker == "wandb":
                run = _wandb_id(folder, iterations)
                options = {"name": folder.name, "dir": str(folder), "id": run, "resume": "allow"}
            tracker = kind(*place, **options)
        tracker.start()
        if iterations < 0:
            plain = {k: x if isinstance(x, bool | int | float | str) else str(x) for k, x in settings.items()}
            tracker.store_init_configuration(plain)
        started.append(tracker)
    return started


def _wandb_id(folder: Path, iterations: int) -> str:
    """The run's name at Weights & Biases: a new one for a run that begins."""
    path = folder / WANDB_ID
    if iterations < 0 or not path.is_file():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


def log_picture(tracker: GeneralTracker, name: str, path: Path, step: int) -> None:
    """Hand on a picture from a file; trackers that take none are left out."""
    if not hasattr(tracker, "log_images"):
        return
    pixels = np.asarray(Image.open(path).convert("RGB"))
    # Most take a list of pictures; accelerate hands what TensorBoard, Aim and ClearML get on as it is.
    forms = {"tensorboard": pixels.transpose(2, 0, 1)[None], "aim": pixels, "clearml": pixels}
    tracker.log_images({name: forms.get(tracker.name, [pixels])}, step=step)
