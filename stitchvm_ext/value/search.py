"""Stage 1: the closed-form search for where to cut (METHOD.md §3).

One forward per probe image serves every pair. The first images are summed up, for every depth i, into the Gram matrix
of the features (shared by all j) and the cross matrix with the reward's tokens of all j side by side; every solution
follows from these sums. The other images are then predicted by every solution. Memory does not grow with the number of
images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..backbones import DiffusionBackbone, Encoding, expand_rows, expand_sigma
from ..ops import resample_tokens
from ..rewards.base import RewardModel
from .least_squares import LeastSquares, PositionSums, squares
from .stitch_layer import patchify

MAX_LAYER = 4  # deeper cuts raise the loss by an order of magnitude and no finetuning recovers them (METHOD.md §3)
TOKENS = ("fitted", "literal")


@dataclass
class StitchCandidate:
    """One cell of the search: the closed-form stitch of depth i onto layer j and its loss on held-out probe images.

    Attributes:
        mse: mean squared error per element.
        unexplained: the fraction of the target's variance (about its mean at each position) that is left.
        weight: W [C', C].
        bias: [C'], or per position [N', C'] for fitted tokens at j > 1.
        prefix: the mean prefix tokens [P, C'] for fitted tokens at j > 1, otherwise None.
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
    """Every candidate of a search, and the pick: the lowest mean squared error among depth >= 1 and layer <= 4.

    ``tokens`` is how position and prefix tokens are made at j > 1, see :func:`search_stitch`.
    """

    candidates: dict[tuple[int, int], StitchCandidate]
    tokens: str = "fitted"

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

    def summary(self) -> dict[str, Any]:
        """JSON-ready: losses of all cells, and the pick."""
        cells = [
            {"depth": c.depth, "layer": c.layer, "mse": c.mse, "unexplained": c.unexplained}
            for c in self.candidates.values()
        ]
        return {"tokens": self.tokens, "cells": cells, "pick": [self.best.depth, self.best.layer]}

    def save(self, folder: str | Path) -> None:
        """Write ``search.json`` (losses and pick) and ``search.png`` (two heat maps) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "search.json.partial"
        partial.write_text(json.dumps(self.summary(), indent=1))
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


class _Probe:
    """Batches of the probe images: the features of every depth, and the reward's tokens of every layer."""

    def __init__(self, backbone, reward, latents, images, null_condition, layers, seed):
        self.backbone, self.reward, self.null_condition, self.layers = backbone, reward, null_condition, layers
        self.latents, self.images = latents, images
        self.depths = list(range(1, backbone.depth + 1))
        self.grids = [backbone.grid(latents.shape[-2:], depth) for depth in (0, *self.depths)]
        self.generator = torch.Generator().manual_seed(seed)
        self.sigmas = torch.rand(len(latents), generator=self.generator)

    def read(self, start: int, stop: int) -> tuple[Iterator[Tensor], Tensor, dict[int, Tensor]]:
        """Features [B, P, C] on the reward's grid depth by depth; patch tokens of all layers side by side [B, P, J·C'];
        and the prefix tokens in front of them per layer. The noise is drawn on the way, so batches are read in order.
        """
        latents, images = self.latents[start:stop], self.images[start:stop]
        sigma = self.sigmas[start:stop].to(latents.device)
        mix = expand_sigma(sigma, latents)
        # Image by image: the same noise at any batch size.
        noise = torch.stack([torch.randn(latents.shape[1:], generator=self.generator) for _ in range(len(latents))])
        noisy = (1 - mix) * latents + mix * noise.to(latents)
        found = self.backbone.features_at(noisy, sigma, expand_rows(self.null_condition, len(latents)), self.depths)
        patch = latents.shape[-1] // self.grids[0][1]
        features = (
            resample_tokens(f.float(), grid, self.reward.grid)
            for f, grid in zip((patchify(noisy, patch), *(found[i] for i in self.depths)), self.grids, strict=True)
        )
        entering = self.reward.entering_tokens(images.to(self.reward.device), self.layers)
        prefix = {j: tokens[:, : 0 if j == 1 else self.reward.num_prefix_tokens] for j, tokens in entering.items()}
        patches = [entering[j][:, prefix[j].shape[1] :] for j in self.layers]
        return features, torch.cat(patches, dim=2).to(latents.device), prefix


def check_tokens(tokens: str) -> None:
    """Raises ValueError unless ``tokens`` is a way to make position and prefix tokens at j > 1."""
    if tokens not in TOKENS:
        raise ValueError(f"tokens: expected one of {TOKENS}, got {tokens!r}")


@torch.no_grad()
def search_stitch(
    backbone: DiffusionBackbone,
    reward: RewardModel,
    latents: Tensor,
    images: Tensor,
    null_condition: Encoding,
    *,
    layers: list[int] | None = None,
    tokens: str = "fitted",
    held_out_share: float = 0.25,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Fit and rate every stitch (i, j) in closed form, by streaming least squares (METHOD.md §3).

    Depth 0 stands for the noisy latent itself, cut into patches: the baseline that stitches to the VAE without the
    backbone.

    Args:
        latents: clean latents z_0 [N, C, H, W] of the probe images, on the backbone's device.
        images: the probe images [N, 3, H', W'] in [0, 1]. METHOD.md asks for 200 that are not used for training.
        null_condition: one row, see :meth:`DiffusionBackbone.null_condition`.
        layers: the reward layers j to try; 1..4 unless told otherwise.
        tokens: where position and prefix (class) tokens come from at j > 1. "fitted": a bias per position is part of
            the least squares, and the prefix is the probe images' mean. "literal", the paper's own words: W and one
            bias for all positions, to which the reward's input class token, positional embedding and first norm are
            then added as at j = 1.
        held_out_share: the last part of the images, which the fit does not see and the losses are computed on.
        seed: of the noise levels t ~ U[0, 1] and of the noise.

    Raises:
        ValueError: an argument does not fit.
    """
    check_tokens(tokens)
    layers = sorted(set(layers or range(1, min(MAX_LAYER, reward.num_layers) + 1)))
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
    probe = _Probe(backbone, reward, latents, images, null_condition, layers, seed)
    count = len(layers)
    shared = count if tokens == "literal" else layers.count(1)  # layers, the first ones, with one bias for all

    bar = tqdm(total=len(images), desc="stitch search", disable=not progress)
    sums, targets = [LeastSquares() for _ in probe.grids], PositionSums()
    prefix_sum = dict.fromkeys(layers[shared:], 0.0)
    for start in range(0, fit_count, batch_size):
        stop = min(start + batch_size, fit_count)
        features, patches, prefix = probe.read(start, stop)
        shifted = targets.add(patches)
        for one, f in zip(sums, features, strict=True):
            one.add(f, shifted)
        for j in prefix_sum:
            prefix_sum[j] = prefix_sum[j] + prefix[j].sum(0, dtype=torch.float64)
        bar.update(stop - start)

    width = targets.sum.shape[1] // count
    fits = []
    while sums:  # a depth's sums are freed once it is solved
        fits.append(sums.pop(0).solve(targets, slice(shared * width, None)))
    mean = targets.mean.float()
    variance, errors = 0.0, [0.0 for _ in fits]
    for start in range(fit_count, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        features, patches, _ = probe.read(start, stop)
        variance = variance + squares(patches - mean, count)
        for depth, f in enumerate(features):
            errors[depth] = errors[depth] + fits[depth].squared_error(f, patches, count)
        bar.update(stop - start)
    bar.close()

    elements = (len(images) - fit_count) * mean.numel() // count
    candidates = {}
    for depth, fit in enumerate(fits):
        parts = zip(fit.weight.split(width), fit.bias.split(width, dim=1), strict=True)
        for k, (j, (weight, bias)) in enumerate(zip(layers, parts, strict=True)):
            candidates[depth, j] = StitchCandidate(
                depth=depth,
                layer=j,
                mse=float(errors[depth][k]) / elements,
                unexplained=float(errors[depth][k] / variance[k]),
                weight=weight,
                bias=bias[0].clone() if k < shared else bias,
                prefix=(prefix_sum[j] / fit_count).float() if j in prefix_sum else None,
            )
    return SearchResult(candidates, tokens)
