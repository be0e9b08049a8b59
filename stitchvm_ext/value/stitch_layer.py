"""The stitching layer s(h) = y + G(y), y = Up(F(h)) (METHOD.md §2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import resample_tokens, silu


class StitchLayer(nn.Module):
    """From the backbone's token grid to what the reward's block ``j`` reads.

    ``F`` is a 1x1 convolution, on tokens a linear map; ``Up`` the bilinear resampling to the reward's grid; ``G`` a
    pointwise MLP with bottleneck 1:8 whose last layer starts at zero. Because the weights of a bilinear resampling
    sum to one, F and Up commute, and the one that leaves fewer tokens runs first.

    For j > 1 the target tokens carry position and an image-dependent class token already. There, unless tokens are to
    be "literal" (see :func:`search_stitch`), a bias per position is part of the fit, and the prefix tokens start from
    the probe images' mean instead of the reward's input class token.

    Args:
        in_width: channels of a backbone token.
        out_width: channels of a reward token.
        out_grid: (h, w) of the reward's patches.
        num_prefix_tokens: 0 for j = 1 and literal tokens; the reward's number of class tokens otherwise.
        with_position: whether there is a bias per position (fitted tokens at j > 1).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        out_grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        with_position: bool = False,
    ):
        super().__init__()
        self.out_grid = tuple(out_grid)
        self.project = nn.Linear(in_width, out_width)
        self.mlp = nn.Sequential(
            nn.SiLU(), nn.Linear(out_width, out_width // 8), nn.SiLU(), nn.Linear(out_width // 8, out_width)
        )
        nn.init.zeros_(self.mlp[3].weight)
        nn.init.zeros_(self.mlp[3].bias)
        patches = out_grid[0] * out_grid[1]
        self.position = nn.Parameter(torch.zeros(patches, out_width)) if with_position else None
        self.prefix = nn.Parameter(torch.zeros(num_prefix_tokens, out_width)) if num_prefix_tokens else None

    @torch.no_grad()
    def load_least_squares(self, weight: Tensor, bias: Tensor, prefix: Tensor | None) -> None:
        """Start from the closed form of METHOD.md §3: weight [C', C], bias [C'] or [N', C'], prefix [P, C'] or None."""
        self.project.weight.copy_(weight)
        if self.position is None:
            self.project.bias.copy_(bias)
        else:
            self.project.bias.zero_()
            self.position.copy_(bias)
        if self.prefix is not None:
            self.prefix.copy_(prefix)

    def read_tokens(self, grid: tuple[int, int]) -> Tensor | None:
        """The tokens of ``grid`` that the resampling reads, int64 [R] in order; None if these are all.

        Bilinear resampling without antialiasing reads two positions per axis and output: 48x48 of 64x64 tokens for a
        24x24 target, 32x32 for a 16x16 one.
        """
        if not self.resamples_first(grid):
            return None
        rows, columns = (_read_positions(n, out) for n, out in zip(grid, self.out_grid, strict=True))
        if len(rows) * len(columns) == grid[0] * grid[1]:
            return None
        return torch.tensor([row * grid[1] + column for row in rows for column in columns])

    def resamples_first(self, grid: tuple[int, int]) -> bool:
        return self.out_grid[0] * self.out_grid[1] <= grid[0] * grid[1]

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Backbone tokens [B, N, C] on ``grid`` -> reward tokens [B, N', C'], or with prefix tokens [B, P+N', C']."""
        with torch.autocast(tokens.device.type, enabled=False):  # the ops want one dtype, that of the weights
            tokens = tokens.to(self.project.weight.dtype)
            if self.resamples_first(grid):
                y = self.project(resample_tokens(tokens, grid, self.out_grid))
                y = y if self.position is None else y + self.position
            else:
                y = F.linear(tokens, self.project.weight)
                y = resample_tokens(y, grid, self.out_grid, bias=self.project.bias, position=self.position)
            g = self.mlp[3](silu(self.mlp[1](silu(y))))
            return resample_tokens(g, self.out_grid, self.out_grid, prefix=self.prefix, residual=y)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """Latents [B, C, H, W] as tokens [B, HW/p², C·p²]: what the value model without a backbone (depth 0) reads. Video
    latents [B, C, T, H, W] as [B, T·HW/p², C·p²].
    """
    if latents.ndim == 5:
        frames = patchify(latents.transpose(1, 2).flatten(0, 1), patch)
        return frames.unflatten(0, (latents.shape[0], latents.shape[2])).flatten(1, 2)
    return F.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)


def _read_positions(size: int, out: int) -> list[int]:
    """Positions of one axis that a bilinear resampling (align_corners=False) to ``out`` positions reads."""
    read = set()
    for o in range(out):
        position, rest = divmod(max(0, (2 * o + 1) * size - out), 2 * out)
        read |= {position, min(position + 1, size - 1)} if rest else {position}
    return sorted(read)
