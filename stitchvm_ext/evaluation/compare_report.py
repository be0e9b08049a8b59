"""A comparison of methods as a table, a plot and a grid of pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

KINDS = ("denoiser", "prefix", "value", "decoder")


@dataclass
class Comparison:
    """What :func:`~stitchvm_ext.evaluation.compare.compare` measured.

    Attributes:
        prompts: P texts.
        images_per_prompt: S.
        target: name of the reward that methods follow.
        figures: by contender "means" and "standard_errors" (over prompts; None of one prompt) of every figure,
            "evaluations_per_image" of the networks, median "seconds_per_image" and "peak_bytes" above what was held
            before.
        images: by contender uint8 [P * S, 3, H, W].
    """

    prompts: list[str]
    images_per_prompt: int
    target: str
    figures: dict[str, dict[str, Any]]
    images: dict[str, Tensor] = field(repr=False)

    def table(self) -> str:
        """For the terminal: a line per contender."""
        measures = list(next(iter(self.figures.values()))["means"])
        width = max(map(len, self.figures))
        columns = [max(16, len(name) + 2) for name in measures]
        head = " " * width + "".join(m.rjust(w) for m, w in zip(measures, columns, strict=True))
        lines = [head + "".join(kind.rjust(10) for kind in KINDS) + "   s/image  peak MiB"]
        for name, row in self.figures.items():
            cells = [
                _cell(row["means"][m], row["standard_errors"][m]).rjust(w)
                for m, w in zip(measures, columns, strict=True)
            ]
            counts = [f"{row['evaluations_per_image'][kind]:10.1f}" for kind in KINDS]
            tail = f"{row['seconds_per_image']:10.2f}{row['peak_bytes'] / 2**20:10.0f}"
            lines.append(name.ljust(width) + "".join(cells) + "".join(counts) + tail)
        lines.append("± is the standard error over prompts; denoiser to decoder: runs of each network per image")
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """Write compare.json, compare.png (rewards against evaluations and seconds) and grid.png into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "prompts": self.prompts, "images_per_prompt": self.images_per_prompt, "target": self.target,
            "contenders": self.figures,
        }  # fmt: skip
        partial = folder / "compare.json.partial"
        partial.write_text(json.dumps(document, indent=1))
        partial.replace(folder / "compare.json")
        self.plot(folder / "compare.png")
        self._grid(folder / "grid.png")

    def plot(self, path: Path) -> None:
        """A PNG of every figure, a panel each: against denoiser evaluations per image, and against seconds per image,
        which have gradients and decodings in them.
        """
        from matplotlib.figure import Figure

        measures = list(next(iter(self.figures.values()))["means"])
        costs = {
            "denoiser evaluations per image": lambda row: row["evaluations_per_image"]["denoiser"],
            "seconds per image": lambda row: row["seconds_per_image"],
        }
        columns = min(3, len(measures))
        rows = -(-len(measures) // columns)
        figure = Figure(figsize=(4.5 * columns, 3.6 * rows * len(costs) + 0.5), layout="constrained")
        axes = figure.subplots(rows * len(costs), columns, squeeze=False)
        for k, (label, cost) in enumerate(costs.items()):
            panels = list(axes[k * rows : (k + 1) * rows].flat)
            for ax in panels[len(measures) :]:
                ax.remove()
            for ax, measure in zip(panels, measures, strict=False):
                self._panel(ax, measure, label, cost)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, dpi=130, format="png")
        partial.replace(path)

    def _panel(self, ax, measure: str, label: str, cost: Callable[[dict], float]) -> None:
        for k, (name, row) in enumerate(self.figures.items()):
            shape = "osD^v"[k // 10 % 5]  # there are ten colours
            error = row["standard_errors"][measure] or 0.0
            style = {"fmt": shape, "color": f"C{k % 10}", "capsize": 3, "markersize": 4}
            ax.errorbar(cost(row), row["means"][measure], error, label=name, **style)
        ax.set(title=measure, xlabel=label, xscale="log")
        ticks: list[float] = []
        for x in sorted(cost(row) for row in self.figures.values()):
            if not ticks or x > 1.25 * ticks[-1]:
                ticks.append(x)
        ax.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
        ax.minorticks_off()
        ax.margins(x=0.25)
        ax.grid(alpha=0.3)

    def _grid(self, path: Path, columns: int = 12) -> None:
        """A row per contender, a column per prompt, each prompt's first picture."""
        from matplotlib.figure import Figure

        columns = min(columns, len(self.prompts))
        figure = Figure(figsize=(1.4 * columns + 1.6, 1.4 * len(self.images) + 0.6), layout="constrained")
        axes = figure.subplots(len(self.images), columns, squeeze=False)
        for ax, prompt in zip(axes[0], self.prompts, strict=False):
            ax.set_title(prompt if len(prompt) < 24 else prompt[:22] + " …", fontsize=6)
        for row, (name, images) in zip(axes, self.images.items(), strict=True):
            for ax, image in zip(row, images[:: self.images_per_prompt], strict=False):
                ax.imshow(image.permute(1, 2, 0).numpy())
                ax.set(xticks=[], yticks=[])
            row[0].set_ylabel(name.replace(":", ":\n").replace(",", ",\n"), fontsize=6)
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, dpi=130, format="png")
        partial.replace(path)


def _cell(mean: float, standard_error: float | None) -> str:
    return f"{mean:.3f}" if standard_error is None else f"{mean:.3f} ± {standard_error:.3f}"
