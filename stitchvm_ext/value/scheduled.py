"""One estimator for high noise levels, another for low ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backbones import Condition
from .base import ValueEstimator
from .carry import Carry


class ScheduledValue(ValueEstimator):
    """The estimator of the noise level's own range: a stitched value where Tweedie's estimate is blind, say, and
    another one below.

    Args:
        stages: pairs (lowest sigma, estimator), such as ``[(0.5, stitched), (0.0, tweedie)]``: the first estimator
            whose lowest noise level is not above sigma is asked. The last pair's is 0.

    Raises:
        TypeError: a stage that is not a number and a ValueEstimator.
        ValueError: noise levels that do not fall to 0, or estimators on different denoisers.
    """

    def __init__(self, stages: Sequence[tuple[float, ValueEstimator]]):
        stages = list(stages)
        for number, stage in enumerate(stages):
            if not isinstance(stage, tuple | list) or len(stage) != 2 or not isinstance(stage[1], ValueEstimator):
                raise TypeError(f"stages: expected pairs (lowest sigma, ValueEstimator), got another at {number}")
        levels = [float(lowest) for lowest, _ in stages]
        if not levels or levels[-1] != 0 or sorted(set(levels), reverse=True) != levels or levels[0] >= 1:
            raise ValueError(f"stages: expected noise levels below 1 that fall to 0, got {levels}")
        self.levels, self.values = levels, [value for _, value in stages]
        self.backbone = self.values[0].backbone
        if any(value.backbone.denoiser is not self.backbone.denoiser for value in self.values):
            raise ValueError("stages: expected estimators on one denoiser, got several")
        self.text_options = next((v.text_options for v in self.values if getattr(v, "text_options", None)), {})

    def at(self, sigma: float | Tensor) -> ValueEstimator:
        """The estimator of a noise level. ValueError for latents of several levels that fall to several estimators."""
        found = {self._index(level) for level in torch.as_tensor(sigma).flatten().tolist()}
        if len(found) != 1:
            raise ValueError("sigma: expected one noise level, or several that fall to one estimator")
        return self.values[found.pop()]

    def _index(self, sigma: float) -> int:
        return next(k for k, lowest in enumerate(self.levels) if sigma >= lowest)

    def check_latent_size(self, latent_size: tuple[int, int]) -> None:
        """Raises ValueError unless every estimator can read latents of this (H, W)."""
        for value in self.values:
            if hasattr(value, "check_latent_size"):
                value.check_latent_size(latent_size)

    def value(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        return self.at(sigma).value(latents, sigma, condition)

    def value_and_grad(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        return self.at(sigma).value_and_grad(latents, sigma, condition)

    def value_and_carry(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Carry | None]:
        return self.at(sigma).value_and_carry(latents, sigma, condition)

    def branches_with_value(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        return self.at(sigma).branches_with_value(latents, sigma, condition)
