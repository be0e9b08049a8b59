"""The resumable state of stage 2."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .stitched import StitchedValue

History = list[dict[str, list[float]]]


def save_state(
    path: str | Path, values: Sequence[StitchedValue], optimizer, run: dict[str, Any], step: int, history: History
) -> None:
    """Write a state to a temporary name, then rename it: whenever the process ends, a whole state is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    state = {
        "run": run,
        "values": [value.state_dict() for value in values],
        "optimizer": optimizer.state_dict(),
        "step": step,
        "history": history,
    }
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_state(
    path: str | Path | None, values: Sequence[StitchedValue], optimizer, run: dict[str, Any]
) -> tuple[int, History]:
    """Set values and optimiser to a saved state. Returns the steps done and the losses so far.

    Raises:
        OSError: the state is another run's; says what differs.
    """
    if path is None or not Path(path).is_file():
        return 0, [{} for _ in values]
    state = torch.load(path, weights_only=True, map_location=values[0].backbone.device)
    saved = state["run"]
    other = [f"{n}: expected {run.get(n)}, got {saved.get(n)}" for n in {**run, **saved} if run.get(n) != saved.get(n)]
    if other:
        raise OSError(f"state_path: {path} belongs to another run ({'; '.join(other)}); remove it to start anew")
    for value, weights in zip(values, state["values"], strict=True):
        value.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["history"]
