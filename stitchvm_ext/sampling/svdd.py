"""Value-based importance sampling without particles (SVDD): the best of several proposals at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import Window, check_count, check_window, steps_of
from .guidance import check_finite
from .particles import check_scale
from .proposals import propose
from .task import Sampled, SamplingTask, sampled


@dataclass(frozen=True)
class SVDD:
    """How proposals are chosen.

    Attributes:
        num_proposals: M, per step.
        proposal_window: half-open range of steps: integers count steps, floats are shares of the schedule.
        scale: draw the kept proposal with odds ``exp(scale V)``; None keeps the best one, as the published code does.
    """

    num_proposals: int = 4
    proposal_window: Window = (0.0, 1.0)
    scale: float | None = None

    num_particles = 1

    def __post_init__(self):
        check_count("num_proposals", self.num_proposals)
        check_window("proposal_window", self.proposal_window)
        if self.scale is not None:
            check_scale("scale", self.scale)

    def check_task(self, task: SamplingTask) -> None:
        """Raises ValueError for a schedule or a transition that these options do not fit."""
        steps_of("proposal_window", self.proposal_window, task.num_steps)
        random = [task.is_random(sigma, sigma_next) for _, sigma, sigma_next in task.steps()]
        if self.num_proposals > 1 and not any(random):
            raise ValueError("transition: expected a stochastic one for num_proposals, got one without noise")


def sample_svdd(task: SamplingTask, options: SVDD) -> Sampled:
    """Each step keeps one of M proposals by their values (SVDD, Li et al., 2408.08252).

    Draws by ``exp(scale V)`` follow the transitions of the tilted distribution as M grows. A latent's value is that of
    the forward process: a transition that adds less noise than its reversal does (``nu² = 2t/(1-t)``, "flow_grpo" with
    a noise level of sqrt 2) leaves a part of the reward to the initial noise, which is not chosen here. So does a
    finite M. The best of M goes beyond the tilt.
    """
    latents, condition = task.start(), task.condition
    chooses = steps_of("proposal_window", options.proposal_window, task.num_steps)
    values = torch.full((task.num_steps, len(task)), float("nan"))
    carry = None
    for step, sigma, sigma_next in task.steps():
        velocity = condition.guide(*task.denoiser.branches(latents, sigma, condition, carry)).float()
        check_finite(step, sigma, velocity=velocity)
        count = options.num_proposals if step in chooses else 1
        kept = propose(task, condition, latents, velocity, sigma, sigma_next, count, scale=options.scale)
        latents, carry = kept.latents, kept.carry
        if kept.values is not None:
            values[step] = kept.values.cpu()
        check_finite(step, sigma, latents=latents)
        task.on_step()
    return sampled(task, values, latents)
