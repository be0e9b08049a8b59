"""Search along the trajectory with a budget of value evaluations, in which what a step does not need serves later ones
(Rollover Budget Forcing, Kim et al., 2503.19385).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..value.carry import Carry
from .checks import check_count
from .guidance import check_finite
from .particles import check_values
from .proposals import propose
from .task import Sampled, SamplingTask, sampled


@dataclass(frozen=True)
class Search:
    """The budget.

    Attributes:
        num_particles: initial noises, of which the first step keeps the best by its value after that step.
        proposals_per_step: proposals that every later step adds to a sample's budget. A step draws proposals until one
            is valued higher than the latent that it starts from, or the budget is used up, and then keeps the best.
    """

    num_particles: int = 1
    proposals_per_step: int = 4

    def __post_init__(self):
        check_count("num_particles", self.num_particles)
        check_count("proposals_per_step", self.proposals_per_step)

    def check_task(self, task: SamplingTask) -> None:
        """Raises ValueError for a transition that these options do not fit."""
        if not any(task.is_random(sigma, sigma_next) for _, sigma, sigma_next in task.steps()):
            raise ValueError("transition: expected a stochastic one for search, got one without noise, such as 'ode'")


def sample_search(task: SamplingTask, options: Search) -> Sampled:
    """One latent per sample goes down the noise levels, a step to the first proposal that improves its value."""
    samples = len(task)
    latents, condition = task.start(options.num_particles), task.condition
    values = torch.full((task.num_steps, samples), float("nan"))
    budget = torch.zeros(samples, dtype=torch.long)
    carry: Carry | None = None
    reached = torch.full((samples,), -torch.inf)  # V of the latent that a step starts from
    for step, sigma, sigma_next in task.steps():
        if step == 0:
            latents, reached, carry = _first_step(task, options, latents, sigma, sigma_next)
            values[step] = reached
            task.on_step()
            continue
        velocity = condition.guide(*task.denoiser.branches(latents, sigma, condition, carry)).float()
        check_finite(step, sigma, velocity=velocity)
        if not (task.is_random(sigma, sigma_next) and sigma_next > 0):
            latents, carry = propose(task, condition, latents, velocity, sigma, sigma_next, 1).latents, None
        else:
            budget += options.proposals_per_step
            latents, reached, carry = _improve(task, latents, velocity, sigma, sigma_next, reached, budget)
            values[step] = reached
        check_finite(step, sigma, latents=latents)
        task.on_step()
    return sampled(task, values, latents)


def _first_step(task: SamplingTask, options: Search, latents, sigma: float, sigma_next: float):
    """The best of the initial latents, each after its first step."""
    count = options.num_particles
    condition = task.repeated(count)
    velocity = condition.guide(*task.denoiser.branches(latents, sigma, condition)).float()
    check_finite(0, sigma, velocity=velocity)
    latents = task.transition(latents, velocity, sigma, sigma_next, task.step_noise(sigma, sigma_next, count))
    found, carry = task.denoiser.values(latents, sigma_next, condition, carry=sigma_next > 0)
    table = found.view(len(task), count)
    check_values(table)
    best = table.argmax(1)
    rows = best + count * torch.arange(len(task), device=best.device)
    return latents[rows], found[rows].cpu(), carry.rows(rows) if carry else None


def _improve(task: SamplingTask, latents, velocity, sigma: float, sigma_next: float, reached, budget):
    """Rounds of one proposal for every sample that has not improved and has budget left; takes it off ``budget``."""
    following = torch.empty_like(latents)
    best = torch.full((len(task),), -torch.inf)
    carries: list[Carry | None] = [None] * len(task)
    open_rows = list(range(len(task)))
    while open_rows:
        part = task.rows(open_rows)
        noise = part.step_noise(sigma, sigma_next)
        found = task.transition(latents[open_rows], velocity[open_rows], sigma, sigma_next, noise)
        values, carry = part.denoiser.values(found, sigma_next, part.condition, carry=True)
        check_values(values[:, None])
        for place, (row, value) in enumerate(zip(open_rows, values.cpu().tolist(), strict=True)):
            budget[row] -= 1
            if value > best[row] or best[row] == -torch.inf:
                best[row], following[row] = value, found[place]
                carries[row] = carry.rows(torch.tensor([place])) if carry else None
        open_rows = [row for row in open_rows if best[row] <= reached[row] and budget[row] > 0]
    carry = None if carries[0] is None else carries[0].cat(carries[1:])
    return following, best, carry
