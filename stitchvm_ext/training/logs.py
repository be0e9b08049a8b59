"""What a run writes down: a JSON line per iteration, the same to trackers, curves, grids of pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from torch import Tensor

from .trackers import log_picture, start_trackers


class RunLog:
    """``metrics.jsonl`` of a run, one object per iteration, and the same numbers to trackers.

    Args:
        folder: of the run.
        iterations: done so far, -1 for a run that begins; lines beyond it, which a resumed run writes again, are
            dropped.
        trackers: see :func:`start_trackers`.
        settings: of the run, for the trackers.
    """

    def __init__(
        self,
        folder: Path,
        iterations: int,
        trackers: Sequence[str | GeneralTracker] = (),
        settings: Mapping[str, Any] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["iteration"] <= iterations]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self.path)
        self.trackers = start_trackers(trackers, folder, iterations, settings or {})

    def write(self, row: dict[str, float], picture: Path | None = None) -> None:
        """Append one iteration's numbers, ``row`` has "iteration", and hand them and a picture to the trackers."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {name: number for name, number in row.items() if name != "iteration"}
        for tracker in self.trackers:
            tracker.log(numbers, step=row["iteration"])
            if picture is not None:
                log_picture(tracker, "samples", picture, row["iteration"])

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a ``metrics.jsonl``; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_curves(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Every number whose name begins with "reward" or "held_out" against the iteration, as a PNG."""
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name in row if name.startswith(("reward/", "held_out/"))})
    if not names:
        return
    columns = min(3, len(names))
    figure = Figure(figsize=(4.5 * columns, 3 * -(-len(names) // columns)), layout="constrained")
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot(-(-len(names) // columns), columns, number)
        points = [(row["iteration"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None)
        axes.set(title=name, xlabel="iteration")
    _save(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def save_grid(images: Tensor, path: Path, columns: int = 4) -> None:
    """Pictures [N, 3, H, W] in [0, 1] side by side, as a PNG."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    pixels = (images.clamp(0, 1).permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
    pictures = [Image.fromarray(p) for p in pixels]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    pictures += [Image.new("RGB", pictures[0].size, "white")] * (rows * columns - len(pictures))
    grid = make_image_grid(pictures, rows=rows, cols=columns)
    _save(path, lambda partial: grid.save(partial, format="PNG"))


def _save(path: Path, write) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)
