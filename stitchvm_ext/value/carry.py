"""What an evaluation of a value leaves behind for the denoiser's next pass on the same latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbones import Condition, DiffusionBackbone
from ..backbones.replay import cat_rows, replayed, rows_of


class Carry(ABC):
    """Work already done on some latents at some noise level."""

    @abstractmethod
    def rows(self, index: Tensor) -> Carry:
        """That of some of the latents, given by position."""

    @abstractmethod
    def cat(self, others: Sequence[Carry]) -> Carry:
        """This one's rows and then those of the others."""

    @abstractmethod
    def branches(
        self, backbone: DiffusionBackbone, latents: Tensor, sigma: float, condition: Condition
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`DiffusionBackbone.branches`, on the very latents that the work was done on."""


class VelocityCarry(Carry):
    """Both branches' velocities: the denoiser has run."""

    def __init__(self, cond: Tensor, uncond: Tensor | None):
        self.cond, self.uncond = cond, uncond

    def rows(self, index: Tensor) -> VelocityCarry:
        index = index.to(self.cond.device)
        return VelocityCarry(self.cond[index], None if self.uncond is None else self.uncond[index])

    def cat(self, others: Sequence[VelocityCarry]) -> VelocityCarry:
        parts = [self, *others]
        uncond = None if self.uncond is None else torch.cat([p.uncond for p in parts])
        return VelocityCarry(torch.cat([p.cond for p in parts]), uncond)

    def branches(self, backbone, latents, sigma, condition):
        return self.cond, self.uncond


class PrefixCarry(Carry):
    """What the first blocks returned for the branch that a stitched value shares.

    Args:
        value: the stitched value; it knows which branch that is.
        outputs: of the backbone's blocks 1 to ``len(outputs)``.
    """

    def __init__(self, value, outputs: Sequence[Any]):
        self.value, self.outputs = value, outputs

    def rows(self, index: Tensor) -> PrefixCarry:
        return PrefixCarry(self.value, rows_of(self.outputs, index))

    def cat(self, others: Sequence[PrefixCarry]) -> PrefixCarry:
        return PrefixCarry(self.value, cat_rows([self.outputs, *(other.outputs for other in others)]))

    @torch.no_grad()
    def branches(self, backbone, latents, sigma, condition):
        with replayed(backbone.blocks[: len(self.outputs)], self.outputs):
            shared = backbone.velocity(latents, sigma, self.value.text_of(condition))
        other = self.value.other_branch(condition)
        other_velocity = None if other is None else backbone.velocity(latents, sigma, other)
        return self.value.as_branches(shared, other_velocity)
