"""The usual baseline: denoise in one step, decode, score."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbones import Condition, backbone_of, expand_sigma
from ..measure import phase
from ..rewards.base import RewardModel
from ..rewards.sum import RewardSum
from .base import ValueEstimator, score_images
from .carry import VelocityCarry


class TweedieValue(ValueEstimator):
    """``r(D(z_t - t u))``: the reward of the decoded posterior mean (METHOD.md §5, baseline DPS).

    The velocity is the guided (CFG) one. It is biased where the posterior is wide, because the reward of a mean is
    not the mean of the reward, and its gradient runs through the reward, the decoder and both branches of the denoiser.

    Args:
        pipe: a pipeline with ``transformer`` and ``vae``.
        reward: scores images in [0, 1]; one reward or a sum of several.
    """

    def __init__(self, pipe, reward: RewardModel | RewardSum):
        self.backbone = backbone_of(pipe)
        self.vae = pipe.vae
        self.reward = reward

    def denoised_images(self, latents: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
        """The decoded posterior mean [B, 3, H, W] (videos [B, 3, F, H, W]) that a velocity at ``latents`` implies."""
        clean = latents.float() - expand_sigma(sigma, latents) * velocity.float()
        return self.backbone.decode_latents(self.vae, clean)

    def score_velocity(self, latents: Tensor, sigma: Tensor, velocity: Tensor, condition: Condition) -> Tensor:
        """The reward [B] of the posterior mean that a velocity at ``latents`` implies."""
        return score_images(self.reward, self.denoised_images(latents, sigma, velocity), condition.prompts)

    def value(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        self.check_condition(latents, condition)
        sigma = self.backbone.check_latents(latents, sigma)
        if not bool(sigma.any()):  # the latents are clean: there is nothing to denoise
            return self.score_velocity(latents, sigma, torch.zeros_like(latents), condition)
        return self.score_velocity(latents, sigma, self.backbone.guided_velocity(latents, sigma, condition), condition)

    @torch.no_grad()
    def value_and_carry(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, VelocityCarry | None]:
        """As the base class says: the denoiser has run, at these very latents, which the next step may use."""
        self.check_condition(latents, condition)
        sigma = self.backbone.check_latents(latents, sigma)
        if not bool(sigma.any()):
            return self.value(latents, sigma, condition), None
        cond, uncond = self.backbone.branches(latents, sigma, condition)
        value = self.score_velocity(latents, sigma, condition.guide(cond, uncond), condition)
        return value, VelocityCarry(cond, uncond)

    def branches_with_value(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """As the base class says; the denoiser's one forward pass serves the step and the value's gradient."""
        self.check_condition(latents, condition)
        sigma = self.backbone.check_latents(latents, sigma)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = latents.detach().clone().requires_grad_()
            cond, uncond = self.backbone.branches(leaf, sigma, condition)
            value = self.score_velocity(leaf, sigma, condition.guide(cond, uncond), condition)
            with phase("backward"):
                (grad,) = torch.autograd.grad(value.sum(), leaf)
        return cond.detach(), None if uncond is None else uncond.detach(), value.detach(), grad.float()
