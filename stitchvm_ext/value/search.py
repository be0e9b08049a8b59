"""Stage 1: the closed-form search for where to cut (METHOD.md §3).

One pass over the probe images accumulates, for every depth i, the Gram matrix of the features (shared by all j) and,
for every (i, j), the cross matrix with the reward's tokens. Every loss and every solution follows from these sums, on
images that the fit did not see as well, so memory does not grow with the number of images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..backbones import DiffusionBackbone, Encoding, expand_rows, expand_sigma
from ..ops import resample_tokens
from ..rewards.base import RewardModel
from .stitch_layer import patchify

MAX_LAYER = 4  # deeper cuts raise the loss by an order of magnitude and no finetuning recovers them (METHOD.md §3)
# Eigenvalues of a Gram matrix below this share of the largest count as zero: features are float32, so directions whose
# standard deviation is below 1e-5 of the largest hold rounding noise.
RELATIVE_CUTOFF = 1e-10


class _Sums:
    """Float64 sums over images and positions for one depth i and every layer j."""

    def __init__(self, layers: list[int]):
        self.images = 0
        self.gram: Tensor | float = 0.0  # Σ f fᵀ  [C, C]
        self.features: Tensor | float = 0.0  # Σ f per position  [P, C]
        self.cross: dict[int, Tensor | float] = dict.fromkeys(layers, 0.0)  # Σ f gᵀ  [C, C']
        self.targets: dict[int, Tensor | float] = dict.fromkeys(layers, 0.0)  # Σ g per position  [P, C']
        self.squares: dict[int, Tensor | float] = dict.fromkeys(layers, 0.0)  # Σ |g|²

    def add(self, features: Tensor, targets: dict[int, Tensor]) -> None:
        f = features.double()
        flat = f.flatten(0, 1)
        self.images += f.shape[0]
        self.gram = self.gram + flat.T @ flat
        self.features = self.features + f.sum(0)
        for j, g in targets.items():
            g = g.double()
            self.cross[j] = self.cross[j] + flat.T @ g.flatten(0, 1)
            self.targets[j] = self.targets[j] + g.sum(0)
            self.squares[j] = self.squares[j] + g.square().sum()

    def solve(self, j: int, per_position: bool) -> tuple[Tensor, Tensor]:
        """W [C', C] and the bias, [C'] or per position [P, C']: least squares on centred data, by pseudo-inverse."""
        positions = self.features.shape[0]
        if per_position:
            mean_f, mean_g, weight = self.features / self.images, self.targets[j] / self.images, self.images
        else:
            count = self.images * positions
            mean_f, mean_g, weight = self.features.sum(0, True) / count, self.targets[j].sum(0, True) / count, count
        gram = self.gram - weight * mean_f.T @ mean_f
        cross = self.cross[j] - weight * mean_f.T @ mean_g
        w = (torch.linalg.pinv(gram, rtol=RELATIVE_CUTOFF, hermitian=True) @ cross).T
        bias = mean_g - mean_f @ w.T
        return w, bias if per_position else bias[0]

    def squared_error(self, j: int, w: Tensor, bias: Tensor) -> float:
        """Σ |g - W f - b|² over these images, whoever's fit (W, b) is."""
        positions = self.features.shape[0]
        bias = bias.expand(positions, -1)
        residual_sum = self.targets[j] - self.features @ w.T
        error = self.squares[j] - 2 * (w.T * self.cross[j]).sum() + ((w @ self.gram) * w).sum()
        return float(error - 2 * (bias * residual_sum).sum() + self.images * bias.square().sum())

    def variance(self, j: int, mean: Tensor) -> float:
        """Σ |g - mean(p)|² over these images; ``mean`` [P, C'] comes from the images of the fit."""
        return float(self.squares[j] - 2 * (mean * self.targets[j]).sum() + self.images * mean.square().sum())


@dataclass
class StitchCandidate:
    """One cell of the search: the closed-form stitch of depth i onto layer j and its loss on held-out probe images.

    Attributes:
        mse: mean squared error per element.
        unexplained: the fraction of the target's variance (about its mean at each position) that is left.
        weight, bias, prefix: [C', C], [C'] (j = 1) or [N', C'] (j > 1), and the mean prefix tokens [P, C'] (j > 1) or
            None.
    """

    depth: int
    layer: int
    mse: float
    unexplained: float
    weight: Tensor
    bias: Tensor
    prefix: Tensor | None


@dataclass
class SearchResult:
    """Every candidate of a search, and the pick: the lowest mean squared error among depth >= 1 and layer <= 4."""

    candidates: dict[tuple[int, int], StitchCandidate]

    @property
    def best(self) -> StitchCandidate:
        allowed = [c for c in self.candidates.values() if c.depth >= 1 and c.layer <= MAX_LAYER]
        return min(allowed, key=lambda c: c.mse)

    def at(self, depth: int, layer: int) -> StitchCandidate:
        """The candidate of a cell. Raises ValueError where the search did not look."""
        if (depth, layer) not in self.candidates:
            cells = sorted(self.candidates)
            raise ValueError(
                f"(depth, layer): expected one of the searched cells {cells[0]}..{cells[-1]}, got {(depth, layer)}"
            )
        return self.candidates[depth, layer]

    @property
    def depths(self) -> list[int]:
        return sorted({i for i, _ in self.candidates})

    @property
    def layers(self) -> list[int]:
        return sorted({j for _, j in self.candidates})

    def table(self) -> str:
        """Rows i, columns j: ``mse (fraction unexplained)``, the pick marked with a star."""
        best = self.best
        rows = ["i \\ j " + "".join(f"{j:>18d}" for j in self.layers)]
        for i in self.depths:
            cells = [self.candidates[i, j] for j in self.layers]
            marks = ["*" if c is best else " " for c in cells]
            rows.append(
                f"{i:>5d} "
                + "".join(f"{f'{c.mse:.4f} ({c.unexplained:.3f}){m}':>18s}" for c, m in zip(cells, marks, strict=True))
            )
        return "\n".join(rows)

    def save(self, folder: str | Path) -> None:
        """Write ``search.json`` (losses and pick) and ``search.png`` (two heat maps) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        cells = [
            {"depth": c.depth, "layer": c.layer, "mse": c.mse, "unexplained": c.unexplained}
            for c in self.candidates.values()
        ]
        partial = folder / "search.json.partial"
        partial.write_text(json.dumps({"cells": cells, "pick": [self.best.depth, self.best.layer]}, indent=1))
        partial.replace(folder / "search.json")
        self.plot(folder / "search.png")

    def plot(self, path: str | Path) -> None:
        """Heat maps of both losses over (i, j), the pick framed."""
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        figure = Figure(figsize=(1.6 * len(self.layers) + 5, 0.45 * len(self.depths) + 2), layout="constrained")
        for ax, name, title in zip(
            figure.subplots(1, 2),
            ("mse", "unexplained"),
            ("mean squared error", "fraction of variance unexplained"),
            strict=True,
        ):
            values = [[getattr(self.candidates[i, j], name) for j in self.layers] for i in self.depths]
            ax.imshow(values, cmap="viridis_r", aspect="auto")
            middle = (min(map(min, values)) + max(map(max, values))) / 2
            for y, row in enumerate(values):
                for x, v in enumerate(row):
                    ax.text(
                        x, y, f"{v:.3f}", ha="center", va="center", color="white" if v > middle else "black", fontsize=8
                    )
            x, y = self.layers.index(self.best.layer), self.depths.index(self.best.depth)
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
            ax.set(title=title, xlabel="reward layer j", ylabel="backbone depth i")
            ax.set_xticks(range(len(self.layers)), self.layers)
            ax.set_yticks(range(len(self.depths)), self.depths)
        figure.savefig(path, dpi=120)


@torch.no_grad()
def search_stitch(
    backbone: DiffusionBackbone,
    reward: RewardModel,
    latents: Tensor,
    images: Tensor,
    null_condition: Encoding,
    *,
    layers: list[int] | None = None,
    held_out_share: float = 0.25,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Fit and rate every stitch (i, j) in closed form, float64, in one streaming pass (METHOD.md §3).

    Depth 0 stands for the noisy latent itself, cut into patches: the baseline that stitches to the VAE without the
    backbone.

    Args:
        latents: clean latents z_0 [N, C, H, W] of the probe images, on the backbone's device.
        images: the probe images [N, 3, H', W'] in [0, 1]. METHOD.md asks for 200 that are not used for training.
        null_condition: one row, see :meth:`DiffusionBackbone.null_condition`.
        layers: the reward layers j to try; 1..4 unless told otherwise.
        held_out_share: the last part of the images, which the fit does not see and the losses are computed on.
        seed: of the noise levels t ~ U[0, 1] and of the noise.
    """
    layers = sorted(layers or range(1, min(MAX_LAYER, reward.num_layers) + 1))
    for j in layers:
        reward.check_layer(j)
    if len(latents) != len(images):
        raise ValueError(f"images: expected {len(latents)}, one per latent, got {len(images)}")
    fit_count = len(images) - round(held_out_share * len(images))
    if not 0 < fit_count < len(images):
        raise ValueError(
            f"images: expected enough for a fit and a held-out part, got {len(images)} with "
            f"held_out_share={held_out_share}"
        )
    depths = list(range(1, backbone.depth + 1))
    grids = [backbone.grid(latents.shape[-2:], depth) for depth in (0, *depths)]
    patch = latents.shape[-1] // grids[0][1]
    generator = torch.Generator().manual_seed(seed)
    sigmas = torch.rand(len(latents), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)

    fit = [_Sums(layers) for _ in range(backbone.depth + 1)]
    held_out = [_Sums(layers) for _ in range(backbone.depth + 1)]
    prefix_sum = dict.fromkeys(layers, 0.0)
    starts = [*range(0, fit_count, batch_size), *range(fit_count, len(images), batch_size)]
    for start in tqdm(starts, desc="stitch search", disable=not progress):
        stop = min(start + batch_size, fit_count if start < fit_count else len(images))
        sigma = sigmas[start:stop].to(latents.device)
        mix = expand_sigma(sigma, latents)
        noisy = (1 - mix) * latents[start:stop] + mix * noise[start:stop].to(latents)
        found = backbone.features_at(noisy, sigma, expand_rows(null_condition, stop - start), depths)
        features = [patchify(noisy, patch), *(found[depth] for depth in depths)]
        entering = reward.entering_tokens(images[start:stop].to(reward.device), layers)
        targets = {}
        for j, tokens in entering.items():
            prefix = 0 if j == 1 else reward.num_prefix_tokens
            targets[j] = tokens[:, prefix:].to(latents.device)
            if start < fit_count:
                prefix_sum[j] = prefix_sum[j] + tokens[:, :prefix].double().sum(0)
        for sums, f, grid in zip(fit if start < fit_count else held_out, features, grids, strict=True):
            sums.add(resample_tokens(f.float(), grid, reward.grid), targets)

    candidates = {}
    for i, (seen, unseen) in enumerate(zip(fit, held_out, strict=True)):
        for j in layers:
            weight, bias = seen.solve(j, per_position=j > 1)
            error = unseen.squared_error(j, weight, bias)
            candidates[i, j] = StitchCandidate(
                depth=i,
                layer=j,
                mse=error / (unseen.images * unseen.targets[j].numel()),
                unexplained=error / unseen.variance(j, seen.targets[j] / seen.images),
                weight=weight.float(),
                bias=bias.float(),
                prefix=(prefix_sum[j] / fit_count).float() if j > 1 else None,
            )
    return SearchResult(candidates)
