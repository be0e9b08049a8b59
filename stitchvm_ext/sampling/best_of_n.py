"""Best-of-N: draw several samples, keep the one with the highest reward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import check_count, step_of
from .guidance import check_finite
from .particles import check_values
from .task import Sampled, SamplingTask, sampled


@dataclass(frozen=True)
class BestOfN:
    """How many samples, and which of them are finished.

    Attributes:
        num_particles: N, per sample.
        keep: pairs (step, number): after this step, the so many with the highest value go on and the others are
            dropped. A float is a share of the schedule.
        stop_above: draw one sample after the other, and stop at the first whose reward is at least this.
    """

    num_particles: int = 4
    keep: tuple[tuple[int | float, int], ...] = ()
    stop_above: float | None = None

    def __post_init__(self):
        check_count("num_particles", self.num_particles)
        left = self.num_particles
        for pair in self.keep:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"keep: expected pairs (step, number), got {pair!r}")
            check_count("keep", pair[1])
            if pair[1] >= left:
                raise ValueError(f"keep: expected fewer than {left} to go on, got {pair[1]}")
            left = pair[1]
        if self.stop_above is not None and self.keep:
            raise ValueError("keep: expected none with stop_above, which draws one sample after the other")

    def check_task(self, task: SamplingTask) -> None:
        """Raises ValueError for a schedule that these options do not fit."""
        steps = [step_of("keep", step, task.num_steps) for step, _ in self.keep]
        if steps != sorted(set(steps)) or any(step >= task.num_steps for step in steps):
            raise ValueError(f"keep: expected rising steps below {task.num_steps}, got {steps}")
        if self.keep and task.denoiser.value is None:
            raise ValueError("value: expected an estimator for keep, got None")


def sample_best_of_n(task: SamplingTask, options: BestOfN) -> Sampled:
    """N samples, of which the one with the highest reward is kept."""
    if options.stop_above is not None:
        return _one_by_one(task, options)
    count = options.num_particles
    latents, values = _draw(task, task.start(count), count, options)
    left = len(latents) // len(task)
    rewards = task.rewards(latents, task.repeated(left)).view(len(task), left)
    check_values(rewards)
    return sampled(task, values, latents, rewards, rewards.argmax(1).cpu())


def _draw(task: SamplingTask, latents: Tensor, count: int, options: BestOfN) -> tuple[Tensor, Tensor]:
    """Finished latents [S * left, ...] and values [T, S]."""
    drops = {step_of("keep", step, task.num_steps): number for step, number in options.keep}
    values = torch.full((task.num_steps, len(task)), float("nan"))
    condition, carry = task.repeated(count), None
    for step, sigma, sigma_next in task.steps():
        velocity = condition.guide(*task.denoiser.branches(latents, sigma, condition, carry)).float()
        check_finite(step, sigma, velocity=velocity)
        noise = task.step_noise(sigma, sigma_next, count)
        latents, carry = task.transition(latents, velocity, sigma, sigma_next, noise), None
        check_finite(step, sigma, latents=latents)
        if step in drops:
            found, carry = task.denoiser.values(latents, sigma_next, condition, carry=sigma_next > 0)
            table = found.view(len(task), count)
            check_values(table)
            values[step] = table.mean(1).cpu()
            best = table.topk(drops[step], 1).indices.sort(1).values
            rows = (best + count * torch.arange(len(task), device=best.device)[:, None]).flatten()
            count = drops[step]
            latents, condition = latents[rows], task.repeated(count)
            carry = carry.rows(rows) if carry else None
        task.on_step()
    return latents, values


def _one_by_one(task: SamplingTask, options: BestOfN) -> Sampled:
    """Rounds of one sample for everybody whose best is not good enough yet."""
    count = options.num_particles
    given = None if task.latents is None else task.latents.view(len(task), count, *task.shape)
    rewards = torch.full((len(task), count), float("nan"))
    particles = torch.full((len(task), count, *task.shape), float("nan"), device=task.denoiser.backbone.device)
    values = torch.full((task.num_steps, len(task)), float("nan"))
    open_rows = list(range(len(task)))
    for number in range(count):
        part = task.rows(open_rows)
        part = replace(part, latents=None if given is None else given[open_rows, number])
        latents, _ = _draw(part, part.start(), 1, options)
        particles[open_rows, number] = latents
        rewards[open_rows, number] = task.rewards(latents, part.condition).cpu()
        check_values(rewards[open_rows, number : number + 1])
        open_rows = [s for s in open_rows if rewards[s, number] < options.stop_above]
        if not open_rows:
            break
    best = rewards.nan_to_num(nan=-torch.inf).argmax(1)
    return sampled(task, values, particles.flatten(0, 1), rewards, best)
