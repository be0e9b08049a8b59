"""The networks that a sampling method asks: the denoiser and the value on it, so many latents at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backbones import Condition, DiffusionBackbone
from ..value.base import ValueEstimator
from ..value.carry import Carry


class Denoiser:
    """A backbone and a value estimator under one condition per latent.

    Args:
        backbone: yields the velocity.
        value: the estimator, on this backbone or one of the same latent space; None for plain sampling.
        batch_size: latents that are evaluated together; all by default.
    """

    def __init__(self, backbone: DiffusionBackbone, value: ValueEstimator | None, batch_size: int | None = None):
        self.backbone, self.value, self.batch_size = backbone, value, batch_size
        self.shares_backbone = value is not None and value.backbone.denoiser is backbone.denoiser

    @torch.no_grad()
    def branches(
        self, latents: Tensor, sigma: float, condition: Condition, carry: Carry | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Conditional and unconditional velocity; ``carry`` is what :meth:`values` left of these very latents."""
        if carry is None:
            return self._in_batches(lambda z, c, _: self.backbone.branches(z, sigma, c), latents, condition)

        def go_on(z, c, rows):
            own = carry if rows is None else carry.rows(rows)
            return own.branches(self.backbone, z, sigma, c)

        return self._in_batches(go_on, latents, condition)

    def branches_with_value(
        self, latents: Tensor, sigma: float, condition: Condition
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Both velocities, V [B] and its gradient, in one pass where the value shares the denoiser's."""
        if self.shares_backbone:
            return self._in_batches(lambda z, c, _: self.value.branches_with_value(z, sigma, c), latents, condition)
        branches = self.branches(latents, sigma, condition)
        return *branches, *self._in_batches(lambda z, c, _: self.value.value_and_grad(z, sigma, c), latents, condition)

    @torch.no_grad()
    def values(
        self, latents: Tensor, sigma: float, condition: Condition, carry: bool = False
    ) -> tuple[Tensor, Carry | None]:
        """V float32 [B], and with ``carry`` what the next :meth:`branches` on these latents need not compute again."""
        if not (carry and self.shares_backbone):
            ask = lambda z, c, _: (self.value.value(z, sigma, c), None)  # noqa: E731
        else:
            ask = lambda z, c, _: self.value.value_and_carry(z, sigma, c)  # noqa: E731
        values, left = self._in_batches(ask, latents, condition)
        return values.float(), left

    def _in_batches(self, ask: Callable, latents: Tensor, condition: Condition) -> tuple:
        """``ask(latents, condition, positions)`` on batches; the parts of its results put together again."""
        count = len(latents)
        if self.batch_size is None or self.batch_size >= count:
            return ask(latents, condition, None)
        found = []
        for first in range(0, count, self.batch_size):
            rows = range(first, min(first + self.batch_size, count))
            found.append(ask(latents[rows.start : rows.stop], condition.rows(list(rows)), torch.tensor(rows)))
        return tuple(_join(parts) for parts in zip(*found, strict=True))


def _join(parts: tuple) -> Tensor | Carry | None:
    first = parts[0]
    if first is None:
        return None
    return first.cat(parts[1:]) if isinstance(first, Carry) else torch.cat(parts)
