"""What is maximised: one interface, the value estimator, for the stitched value and the clean reward alike."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..backbones import Condition, DiffusionBackbone, backbone_of
from ..rewards.base import RewardModel
from ..rewards.sum import RewardSum
from ..value.base import ValueEstimator, score_images
from ..value.sum import ValueSum


class CleanReward(ValueEstimator):
    """``r(D(z_0))``, the baseline of every trainer: an estimator at noise level 0 alone.

    Args:
        pipe: a pipeline with a denoiser and ``vae``.
        reward: scores images in [0, 1]; one reward or a sum of several.
    """

    def __init__(self, pipe, reward: RewardModel | RewardSum):
        self.backbone, self.vae, self.reward = backbone_of(pipe), pipe.vae, reward

    @property
    def reads_encoding(self) -> bool:
        return False

    def images(self, latents: Tensor) -> Tensor:
        """D(z_0) in [0, 1]."""
        return self.backbone.decode_latents(self.vae, latents).clamp(0, 1)

    def value(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        self._check(latents, sigma, condition)
        return score_images(self.reward, self.images(latents), condition.prompts)

    def raw_values(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> list[Tensor]:
        """Scores [B] of every term of a :class:`RewardSum`, not weighted and not normalised."""
        self._check(latents, sigma, condition)
        images = self.images(latents)
        output = self.reward.output(images, pooled_only=True)
        return self.reward.raw_scores(output, self.reward.encode_condition(condition.prompts))

    def _check(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> None:
        self.check_condition(latents, condition)
        if bool((torch.as_tensor(sigma) > 0).any()):
            raise ValueError(
                "sigma: a clean reward reads clean latents alone, expected 0, got "
                f"{float(torch.as_tensor(sigma).max()):g}; score noisy ones by a StitchedValue"
            )


def scores_by_term(
    value: ValueEstimator, latents: Tensor, sigma: float | Tensor, condition: Condition
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value [B], and of a sum every term's raw score [B] by a name that tells it from the others."""
    weighted = getattr(value if isinstance(value, ValueSum) else getattr(value, "reward", None), "weighted", None)
    if weighted is None or not hasattr(value, "raw_values"):
        return value.value(latents, sigma, condition), {}
    raw = value.raw_values(latents, sigma, condition)
    return weighted(raw), {f"{k}_{weighted.names[k]}": scores for k, scores in enumerate(raw)}


def rewards_in(value) -> list[RewardModel]:
    """The rewards whose text side an estimator, a sum or a reward reads."""
    if isinstance(value, RewardModel):
        return [value]
    parts = getattr(value, "values", None) or getattr(value, "rewards", None)
    if parts is None:
        parts = [part for part in (getattr(value, name, None) for name in ("suffix", "reward")) if part is not None]
    return [reward for part in parts for reward in rewards_in(part)]


def on_backbone(value: ValueEstimator, old: DiffusionBackbone, new: DiffusionBackbone) -> ValueEstimator:
    """The same estimator on a view of the denoiser that it was made for; one on another denoiser as it is."""
    if value.backbone.denoiser is not old.denoiser:
        return value
    moved = copy.copy(value)
    if isinstance(value, ValueSum):
        moved.values = [on_backbone(v, old, new) for v in value.values]
    object.__setattr__(moved, "backbone", new)  # a stitched value is a module, which would take it for a part
    return moved
