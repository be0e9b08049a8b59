"""What every sampling method is given, and what it gives back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..backbones import Condition
from .denoiser import Denoiser
from .noise import Noise
from .transitions import ReverseSDE, Transition


@dataclass(frozen=True)
class SamplingTask:
    """S samples to be drawn.

    Attributes:
        denoiser: the networks.
        sigmas: [T+1] decreasing noise levels.
        condition: one row per sample.
        transition: one step.
        noise: a source per sample.
        shape: of one latent, [C, H, W] (video: [C, T, H, W]).
        latents: initial latents [S * particles, ...] at ``sigmas[0]`` in flow coordinates, in place of noise.
        reward: of finished latents, ``(latents, condition) -> [B]``; None asks the value at noise level 0.
        on_step: called after each step.
    """

    denoiser: Denoiser
    sigmas: Tensor
    condition: Condition
    transition: Transition
    noise: Noise
    shape: tuple[int, ...]
    latents: Tensor | None = None
    reward: Callable[[Tensor, Condition], Tensor] | None = None
    on_step: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self.condition)

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def steps(self) -> Iterator[tuple[int, float, float]]:
        """(number, sigma, next sigma) of every step."""
        for step, (sigma, sigma_next) in enumerate(itertools.pairwise(self.sigmas.tolist())):
            yield step, sigma, sigma_next

    def start(self, particles: int = 1) -> Tensor:
        """Initial latents float32 [S * particles, ...]."""
        if self.latents is not None:
            return self.latents.detach().float()
        backbone = self.denoiser.backbone
        dtype = torch.float32 if backbone.float32_noise else backbone.dtype
        noise = self.noise.normal(self.shape, particles, dtype).float()
        return backbone.process.flow_latents(noise, self.sigmas[:1].to(noise.device))

    def repeated(self, particles: int) -> Condition:
        """The condition of every particle; those of a sample stand next to each other."""
        return self.condition.rows([s for s in range(len(self)) for _ in range(particles)])

    def rows(self, index: list[int]) -> SamplingTask:
        """The task of some samples, given by position; without initial latents, whose rows are particles."""
        return replace(self, condition=self.condition.rows(index), noise=self.noise.rows(index), latents=None)

    def is_random(self, sigma: float, sigma_next: float) -> bool:
        """Whether the step between these levels draws noise; a user's own transition is given it always."""
        if isinstance(self.transition, ReverseSDE):
            return self.transition.coefficients(sigma, sigma_next)[2] > 0
        return True

    def step_noise(self, sigma: float, sigma_next: float, particles: int = 1) -> Tensor | None:
        """Noise [S * particles, ...] for a step that reads it."""
        return self.noise.normal(self.shape, particles) if self.is_random(sigma, sigma_next) else None

    def rewards(self, latents: Tensor, condition: Condition) -> Tensor:
        """Rewards float32 [B] of finished latents."""
        if self.reward is not None:
            return self.reward(latents, condition).float()
        return self.denoiser.values(latents, 0.0, condition)[0]


@dataclass
class Sampled:
    """What a method returns for S samples of K particles.

    Attributes:
        latents: the chosen ones, float32 [S, ...] at noise level 0.
        values: float32 [T, S] on the CPU: the latest V that step k asked for, of z_t before the step where the value's
            gradient guides, of the particles after it (their mean) elsewhere; NaN where none was asked for.
        particles: all of them [S, K, ...].
        rewards: of the particles, float32 [S, K] on the CPU; NaN for methods that choose nothing.
        log_weights: [S, K]; 0 for methods without weights.
        log_evidence: [S], see :class:`~stitchvm_ext.sampling.particles.ParticleWeights`; NaN without weights.
    """

    latents: Tensor
    values: Tensor
    particles: Tensor = field(repr=False)
    rewards: Tensor
    log_weights: Tensor
    log_evidence: Tensor


def sampled(
    task: SamplingTask,
    values: Tensor,
    particles: Tensor,
    rewards: Tensor | None = None,
    chosen: Tensor | None = None,
    log_weights: Tensor | None = None,
    log_evidence: Tensor | None = None,
) -> Sampled:
    """A method's result; ``particles`` are [S * K, ...], ``chosen`` positions [S] among the K, by default the first."""
    samples = len(task)
    particles = particles.view(samples, -1, *particles.shape[1:])
    chosen = torch.zeros(samples, dtype=torch.long) if chosen is None else chosen
    unknown = torch.full(particles.shape[:2], float("nan"))
    return Sampled(
        latents=particles[torch.arange(samples, device=particles.device), chosen.to(particles.device)],
        values=values.cpu(),
        particles=particles,
        rewards=unknown if rewards is None else rewards.float().cpu().view(samples, -1),
        log_weights=torch.zeros_like(unknown) if log_weights is None else log_weights,
        log_evidence=unknown[:, 0] if log_evidence is None else log_evidence,
    )
