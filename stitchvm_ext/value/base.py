"""The one interface through which samplers and trainers ask for a value."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..backbones import Condition, DiffusionBackbone, Encoding
from ..measure import count, phase
from ..rewards.base import RewardModel
from ..rewards.sum import RewardSum
from .carry import Carry


class ValueEstimator(ABC):
    """Estimates V(z_t, t), the expected reward of what a noisy latent becomes (METHOD.md §1).

    Latents are [B, C, H, W]; sigma is a float or [B], in [0, 1] with 1 = noise; values are float32 [B]. The condition
    has one row per latent.
    """

    backbone: DiffusionBackbone

    @property
    def reads_encoding(self) -> bool:
        """Whether values depend on a condition's encodings; where not, its prompts are enough."""
        return True

    @abstractmethod
    def value(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        """V [B], differentiable with respect to latents where autograd is on."""

    def value_and_grad(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """V [B] and its gradient with respect to latents, float32 like latents; each sample's gradient is its own."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = latents.detach().clone().requires_grad_()
            value = self.value(leaf, sigma, condition)
            with phase("backward"):
                (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad.float()

    @torch.no_grad()
    def value_and_carry(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Carry | None]:
        """V [B], and what the denoiser's next pass on these latents need not compute again; None for nothing.

        An estimator overrides this where it runs the denoiser, or its first blocks, under the sampler's own condition.
        """
        return self.value(latents, sigma, condition), None

    def branches_with_value(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Conditional velocity, unconditional velocity (None without classifier-free guidance), V and its gradient:
        what one guided sampling step needs.

        An estimator overrides this where the denoiser's own pass can serve the value too.
        """
        with torch.no_grad():
            cond, uncond = self.backbone.branches(latents, sigma, condition)
        return cond, uncond, *self.value_and_grad(latents, sigma, condition)

    def denoise_with_value(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The guided (CFG) velocity, V and its gradient."""
        cond, uncond, value, grad = self.branches_with_value(latents, sigma, condition)
        return condition.guide(cond, uncond), value, grad

    def is_null_text(self, encoding: Encoding | None) -> bool:
        """Whether this is the text that the value reads in every row, whatever the prompts are."""
        return False

    def can_share(self, condition: Condition) -> bool:
        """Whether a branch of the denoiser runs the very prefix that the value needs, so that ``shared_branches`` may
        be called.
        """
        return False

    def check_condition(self, latents: Tensor, condition: Condition) -> None:
        if len(condition) != latents.shape[0]:
            raise ValueError(f"condition: expected {latents.shape[0]} rows, one per latent, got {len(condition)}")


def score_images(reward: RewardModel | RewardSum, images: Tensor, prompts: tuple[str, ...]) -> Tensor:
    """Rewards [B] of images [B, 3, H, W] in [0, 1]; of videos [B, 3, F, H, W] the mean over their frames."""
    count("value", len(images))
    if images.ndim == 4:
        with phase("reward"):
            return reward.score(reward.output(images, pooled_only=True), reward.encode_condition(prompts))
    frames = images.transpose(1, 2)
    repeated = tuple(p for p in prompts for _ in range(frames.shape[1]))
    scores = score_images(reward, frames.flatten(0, 1), repeated)
    return scores.view(frames.shape[:2]).mean(1)
