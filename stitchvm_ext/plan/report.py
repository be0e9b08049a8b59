"""A plan as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .devices import Seconds
from .fit import Fit

NOTES = (
    "Predictions: counted from shapes, nothing was run. FLOPs are exact; bytes of memory leave out fragmentation.",
    "Times: from the roofline (80% of the data sheet's arithmetic, 90% of its bandwidth, everything fused) to eager "
    "PyTorch at assumed rates. Published times of whole programs lie up to 2.2 times above the upper end.",
    "Weights are in bfloat16 and leave out text encoders; rewards' text towers run once per prompt and leave. "
    "Quantised weights, weights streamed from the host and tiled decoding are not looked at.",
)


@dataclass(frozen=True)
class Row:
    """A scenario's figures.

    Attributes:
        flops_per_step, bytes_per_step: of one step (training: one iteration). Bytes: every operator reads its operands
            and writes its results once.
        flops: of all steps and the final decoding.
        kernels_per_step: operators that move memory.
        weights, activations, peak: bytes; ``peak`` is their sum.
        seconds_per_step, seconds: (low, high).
    """

    name: str
    group: str
    steps: float
    flops_per_step: float
    bytes_per_step: float
    kernels_per_step: float
    flops: float
    weights: int
    activations: int
    peak: int
    seconds_per_step: Seconds
    seconds: Seconds


@dataclass(frozen=True)
class StageRow:
    """A stage of making the value model: images that pass through it, FLOPs, and (low, high) GPU-hours."""

    name: str
    images: int
    flops: float
    gpu_hours: Seconds


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` predicts.

    Attributes:
        settings: what was asked for, defaults filled in.
        parameters: of the denoiser.
        weights: bytes in bfloat16 by part.
        rows: the scenarios; the first is the plain pipeline or the published method.
        stages: making the stitched value.
        fits: presets by card.
        notes: how to read it.
    """

    settings: dict[str, Any]
    parameters: int
    weights: dict[str, int]
    rows: list[Row]
    stages: list[StageRow]
    fits: list[Fit]
    notes: tuple[str, ...] = NOTES

    def row(self, name: str) -> Row:
        """The scenario of a name. Raises KeyError for another one."""
        return {row.name: row for row in self.rows}[name]

    def table(self) -> str:
        """For the terminal."""
        s = self.settings
        unit = "iteration" if s["method"] in ("nft", "draft") else "step"
        head = (
            f"{s['backbone']}, {' + '.join(s['reward'])}, {s['resolution']} x {s['resolution']} pixels, {s['method']}, "
            f"batch {s['batch']}, on {s['device']}; denoiser of {self.parameters / 1e9:.3f} B parameters, i = "
            f"{s['depth']}, j = {s['layer']}"
        )
        weights = "weights, GB: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.weights.items())
        first = self.rows[0]
        scenarios = [["", f"TFLOP/{unit}", "x", f"GB moved/{unit}", "PFLOP in all", "weights GB", "peak GB", "x",
                      f"seconds/{unit}", "seconds in all"]]  # fmt: skip
        for r in self.rows:
            scenarios.append([
                r.name, f"{r.flops_per_step / 1e12:.2f}", f"{r.flops_per_step / first.flops_per_step:.2f}",
                f"{r.bytes_per_step / 1e9:.0f}", f"{r.flops / 1e15:.3f}", f"{r.weights / 1e9:.2f}",
                f"{r.peak / 1e9:.2f}", f"{r.peak / first.peak:.2f}", _range(r.seconds_per_step), _range(r.seconds),
            ])  # fmt: skip
        stages = [["making the value model", "images", "PFLOP", "GPU-hours"]]
        stages += [[t.name, str(t.images), f"{t.flops / 1e15:.1f}", _range(t.gpu_hours)] for t in self.stages]
        fits = [["does it fit", "card", "GB", "with"]]
        for f in self.fits:
            fits.append([f.group, f"{f.card} GB", f"{f.bytes / 1e9:.1f}", f.preset or "no"])
        left = len(fits[0]) - 1
        parts = [head + "\n" + weights, _columns(scenarios), _columns(stages), _columns(fits, {left})]
        return "\n\n".join([*parts, "\n".join(self.notes)])

    def to_json(self) -> str:
        """All figures, in bytes, FLOPs and seconds."""
        return json.dumps(asdict(self), indent=1)

    def plot(self, path: str | Path) -> None:
        """A PNG: FLOPs, time and memory of every scenario."""
        from matplotlib.figure import Figure

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.rows[::-1]
        names, places = [row.name for row in rows], range(len(rows))
        colours = [{"plain": "#7f7f7f", "tweedie": "#d95f02", "stitched": "#1b9e77"}[row.group] for row in rows]
        figure = Figure(figsize=(15, 1.4 + 0.36 * len(rows)), layout="constrained")
        flops, time, memory = figure.subplots(1, 3, sharey=True)
        flops.barh(places, [row.flops_per_step / 1e12 for row in rows], color=colours)
        low, high = zip(*(row.seconds_per_step for row in rows), strict=True)
        time.barh(places, [h - lo for lo, h in zip(low, high, strict=True)], left=low, color=colours)
        memory.barh(places, [row.weights / 1e9 for row in rows], color=colours, alpha=0.45)
        left = [row.weights / 1e9 for row in rows]
        memory.barh(places, [row.activations / 1e9 for row in rows], left=left, color=colours)
        unit = "iteration" if self.settings["method"] in ("nft", "draft") else "step"
        flops.set(title=f"TFLOP per {unit}", yticks=places, yticklabels=names)
        time.set(title=f"predicted seconds per {unit}, {self.settings['device']}", xlim=(0, None))
        memory.set(title="peak GB; weights are pale")
        for ax in (flops, time, memory):
            ax.grid(axis="x", alpha=0.3)
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, dpi=140, format="png")
        partial.replace(path)


def _range(seconds: Seconds) -> str:
    return f"{_short(seconds.low)}-{_short(seconds.high)}"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _columns(rows: Sequence[Sequence[str]], left: set[int] = frozenset()) -> str:
    """Rows with a header, aligned: to the left in the first column and in ``left``, to the right in the others."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    align = [str.ljust if k == 0 or k in left else str.rjust for k in range(len(widths))]
    return "\n".join("  ".join(f(c, w) for f, c, w in zip(align, row, widths, strict=True)).rstrip() for row in rows)
