"""Accuracy by noise level as a table, a plot and a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Curves = Mapping[str, Sequence[Mapping[str, float]]]  # rows with "sigma" and figures, by the estimator's name

SPEARMAN = "Spearman with the clean reward"


@dataclass
class NoiseLevelReport:
    """What :func:`evaluate_noise_levels` measured.

    Attributes:
        data: the evaluation set's name.
        images: how many pictures.
        size: their (H, W) in pixels.
        metric: what agreement with people is measured by.
        clean: the clean reward's own, where one was given.
        curves: by the estimator's name rows ``{"sigma", metric}``, with the rank correlation with the clean reward
            where one was given.
    """

    data: str
    images: int
    size: tuple[int, int]
    metric: str
    clean: float | None
    curves: dict[str, list[dict[str, float]]]

    def table(self) -> str:
        """For the terminal."""
        head = f"{self.data}, {self.images} images of {self.size[0]} x {self.size[1]} pixels"
        if self.clean is not None:
            head += f"; the clean reward's own {self.metric} is {self.clean:.3f}"
        return "\n\n".join([head, *(f"{name}\n{rows_table(rows)}" for name, rows in self.curves.items())])

    def card_entry(self, name: str) -> dict[str, Any]:
        """One estimator's curve as the model card keeps it, in ``details["accuracy by noise level"][data]``."""
        return {**{k: v for k, v in asdict(self).items() if k not in ("data", "curves")}, "rows": self.curves[name]}

    def save(self, folder: str | Path) -> None:
        """Write accuracy.json and accuracy.png into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "accuracy.json.partial"
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.replace(folder / "accuracy.json")
        figures = [key for key in next(iter(self.curves.values()))[0] if key != "sigma"]
        titles = {key: f"{key} ({self.data})" if key == self.metric else key for key in figures}
        plot_curves(self.curves, titles, folder / "accuracy.png", {self.metric: self.clean})


def rows_table(rows: Sequence[Mapping[str, float]]) -> str:
    """Rows with a common header, three decimals."""
    names = list(rows[0])
    widths = [max(len(name), 7) for name in names]
    lines = ["  ".join(name.rjust(w) for name, w in zip(names, widths, strict=True))]
    lines += ["  ".join(f"{row[n]:.3f}".rjust(w) for n, w in zip(names, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def plot_curves(
    curves: Curves, titles: Mapping[str, str], path: str | Path, clean: Mapping[str, float | None] | None = None
) -> None:
    """A PNG with a panel over the noise level for every figure in ``titles``; ``clean`` draws a level line in it."""
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(4.5 * len(titles), 3.6), layout="constrained")
    for ax, (key, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
        for name, rows in curves.items():
            ax.plot([r["sigma"] for r in rows], [r[key] for r in rows], marker="o", markersize=3, label=name)
        level = (clean or {}).get(key)
        if level is not None:
            ax.axhline(level, color="grey", linestyle="--", linewidth=1, label="clean reward")
        ax.set(title=title, xlabel="noise level", xlim=(0, 1))
        ax.grid(alpha=0.3)
        ax.legend()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=140, format="png")
    partial.replace(path)
