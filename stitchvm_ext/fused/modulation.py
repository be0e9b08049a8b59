"""Where a fused block finds its modulation vectors: from the block's own linear layer, or from a precomputed table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Modulation(NamedTuple):
    """Vectors [R, C] of one AdaLN layer in the layer's own order; sample b uses row ``rows[b]``, or row b without."""

    vectors: tuple[Tensor, ...]
    rows: Tensor | None


def modulation(norm: nn.Module, temb: Tensor, count: int) -> Modulation:
    """The ``count`` vectors that an AdaLN layer of diffusers (``norm.linear``, ``norm.silu``) gives for ``temb``."""
    if isinstance(norm.linear, TableLinear):
        return Modulation(norm.linear.table.chunk(count, 1), norm.linear.lookup.rows)
    return Modulation(norm.linear(norm.silu(temb)).chunk(count, 1), None)


class RowLookup:
    """Which row of the tables each sample of a forward pass uses; stands in for ``time_text_embed.forward``.

    Args:
        timesteps: float32 [T], 1000 sigma.
        pooled: [P, D]. Row ``t * P + p`` of a table belongs to timestep t and pooled embedding p.
        width: channels of the embedding that it stands in for.
    """

    def __init__(self, timesteps: Tensor, pooled: Tensor, width: int):
        self.timesteps, self.pooled, self.width = timesteps, pooled, width
        self.rows: Tensor | None = None

    def __call__(self, timestep: Tensor, pooled_projection: Tensor) -> Tensor:
        """Remember the rows of a batch; returns zeros [B, width], which the tables do not look at."""
        timestep, pooled = timestep.to(self.timesteps), pooled_projection.to(self.pooled)
        check = timestep.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
        off, step = (timestep[:, None] - self.timesteps).abs().min(1)
        if check and bool((off > 1e-2).any()):
            raise ValueError(
                f"timestep: expected one of the {len(self.timesteps)} noise levels that precompute_conditioning was "
                f"given, got sigma {(timestep[off.argmax()] / 1000).item():g}"
            )
        off, text = (pooled[:, None] - self.pooled).abs().amax(-1).min(1)
        if check and bool(
            (off > 2**-7 * self.pooled.abs().max()).any()
        ):  # rounding of bfloat16; another text is far outside
            raise ValueError(
                f"pooled_projections: expected one of the {len(self.pooled)} pooled embeddings that "
                f"precompute_conditioning was given, got another in row {off.argmax().item()}"
            )
        self.rows = step * len(self.pooled) + text
        return pooled_projection.new_zeros(len(pooled), self.width)


class TableLinear(nn.Module):
    """Stands in for an AdaLN layer's linear: ``table`` [R, K C], read at the lookup's rows."""

    def __init__(self, table: Tensor, lookup: RowLookup):
        super().__init__()
        self.register_buffer("table", table, persistent=False)
        self.lookup = lookup

    def forward(self, _: Tensor) -> Tensor:
        return self.table.index_select(0, self.lookup.rows)
