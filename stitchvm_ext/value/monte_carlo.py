"""The expensive truth: roll out, decode, score, average."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbones import Condition, backbone_of
from ..rewards.base import RewardModel
from ..rewards.sum import RewardSum
from .base import ValueEstimator, score_images


class MonteCarloValue(ValueEstimator):
    """``E[r(z_0) | z_t]`` by ``num_rollouts`` stochastic rollouts of the sampler from each latent to the end.

    An estimate with standard error std(r)/sqrt(num_rollouts), of the expectation under the *sampler's* distribution.
    It has no useful gradient; asking for one raises.

    Args:
        pipe: a pipeline with ``transformer`` and ``vae``.
        reward: scores images in [0, 1]; one reward or a sum of several.
        num_rollouts: rollouts averaged per latent.
        num_steps: sampler steps of a rollout that starts at pure noise; later starts take their share of them.
        transition: a stochastic transition of :mod:`stitchvm_ext.sampling`.
        seed: of the rollouts' noise.
    """

    def __init__(
        self,
        pipe,
        reward: RewardModel | RewardSum,
        num_rollouts: int = 16,
        num_steps: int = 40,
        transition: str = "flow_grpo",
        seed: int = 0,
    ):
        if num_rollouts < 1:
            raise ValueError(f"num_rollouts: expected at least 1, got {num_rollouts}")
        if num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
        self.backbone = backbone_of(pipe)
        self.vae = pipe.vae
        self.reward = reward
        self.num_rollouts, self.num_steps = num_rollouts, num_steps
        self.transition, self.seed = transition, seed

    @torch.no_grad()
    def rollout_rewards(self, latents: Tensor, sigma: float, condition: Condition) -> Tensor:
        """Rewards [num_rollouts, B] of rollouts from latents that share one noise level."""
        from ..sampling.transitions import get_transition

        step = get_transition(self.transition)
        steps = max(1, round(self.num_steps * sigma)) if sigma > 0 else 0
        sigmas = [sigma * (1 - k / steps) for k in range(steps)] + [0.0]
        generator = torch.Generator().manual_seed(self.seed)
        rewards = []
        for _ in range(self.num_rollouts):
            z = latents.float()
            for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
                velocity = self.backbone.guided_velocity(z, now, condition)
                noise = torch.randn(z.shape, generator=generator).to(z)
                z = step(z, velocity.float(), now, after, noise)
            images = self.backbone.decode_latents(self.vae, z).clamp(0, 1)
            rewards.append(score_images(self.reward, images, condition.prompts))
        return torch.stack(rewards)

    def value(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        self.check_condition(latents, condition)
        sigma = self.backbone.check_latents(latents, sigma)
        values = torch.empty(len(latents), device=latents.device)
        for level in sigma.unique().tolist():  # those of one level roll out together
            rows = (sigma == level).nonzero().flatten().tolist()
            values[rows] = self.rollout_rewards(latents[rows], level, condition.rows(rows)).mean(0).to(values)
        return values

    def value_and_grad(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        raise TypeError(
            "value: MonteCarloValue has no gradient; guide with StitchedValue or TweedieValue, or use it in a particle "
            "method"
        )
