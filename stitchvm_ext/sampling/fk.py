"""Feynman-Kac steering: weighted particles, with proposals under the value and with twisted (guided) proposals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones import Condition
from ..value.carry import Carry
from .checks import Window, check_count, check_window, steps_of
from .guidance import Guidance, check_finite
from .particles import POTENTIALS, RESAMPLERS, ParticleWeights, check_scale, check_share
from .proposals import propose
from .task import Sampled, SamplingTask, sampled
from .transitions import ReverseSDE

SELECTIONS = ("best", "sample")


@dataclass(frozen=True)
class FK:
    """How particles are steered.

    Windows are half-open ranges (first, end) of steps: integers count steps, floats are shares of the schedule, an end
    of None is the last step.

    Attributes:
        num_particles: K, per sample.
        num_proposals: M, proposals of each particle within ``proposal_window``; the best under the value goes on. With
            M > 1 particles follow another law than the model's, which no weight corrects (nor in the paper).
        proposal_window: by default the first 40% of the steps, as in the paper.
        potential: "diff", "max" or "sum", see :class:`~stitchvm_ext.sampling.particles.ParticleWeights`.
        scale: lambda of the potentials; None sets it at every event by ``target_ess``.
        target_ess: share of K that is left in effect by one event's potentials, where there is no scale.
        resample_window: of the events, by default 20% to 80% of the steps, as in the paper.
        resample_every: steps between events; the first is at the window's first step.
        ess_threshold: events resample where the effective sample size is below this share of K; weights are carried on
            elsewhere. 1 resamples wherever weights differ.
        resampling: "systematic", "multinomial" or "residual".
        select: which particle becomes the image: "best" by reward, or one drawn by weight ("sample").
        guidance: bends the proposals by the value's gradient (twisted proposals); their weights are corrected for it.
    """

    num_particles: int = 4
    num_proposals: int = 1
    proposal_window: Window = (0.0, 0.4)
    potential: str = "diff"
    scale: float | None = None
    target_ess: float = 0.5
    resample_window: Window = (0.2, 0.8)
    resample_every: int = 4
    ess_threshold: float = 1.0
    resampling: str = "systematic"
    select: str = "best"
    guidance: Guidance | None = None

    def __post_init__(self):
        for name in ("num_particles", "num_proposals", "resample_every"):
            check_count(name, getattr(self, name))
        for name in ("proposal_window", "resample_window"):
            check_window(name, getattr(self, name))
        choices = {"potential": POTENTIALS, "resampling": tuple(RESAMPLERS), "select": SELECTIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, got {getattr(self, name)!r}")
        if self.scale is not None:
            check_scale("scale", self.scale)
        check_share("target_ess", self.target_ess)
        check_share("ess_threshold", self.ess_threshold)
        if self.guidance is not None and not isinstance(self.guidance, Guidance):
            raise TypeError(f"guidance: expected a Guidance or None, got {type(self.guidance).__name__}")

    def check_task(self, task: SamplingTask) -> None:
        """Raises ValueError for a schedule or a transition that these options do not fit."""
        steps_of("resample_window", self.resample_window, task.num_steps)
        if self.num_proposals > 1:
            steps_of("proposal_window", self.proposal_window, task.num_steps)
        needs_noise = {"num_particles": self.num_particles > 1, "num_proposals": self.num_proposals > 1}
        needs_noise["guidance"] = self.guidance is not None
        if any(needs_noise.values()) and not _draws_noise(task):
            name = next(name for name, needed in needs_noise.items() if needed)
            raise ValueError(f"transition: expected a stochastic one for {name}, got one without noise, such as 'ode'")
        if self.guidance is not None:
            if not isinstance(task.transition, ReverseSDE):
                raise ValueError("transition: expected one by name for guided proposals, whose density is known")
            self.guidance.check_task(task)


def sample_fk(task: SamplingTask, options: FK) -> Sampled:
    """Particles that are weighed, resampled and, at the end, weighed by their reward (FK steering; METHOD.md §5)."""
    count = options.num_particles
    latents, condition = task.start(count), task.repeated(count)
    events = steps_of("resample_window", options.resample_window, task.num_steps)[:: options.resample_every]
    chooses = steps_of("proposal_window", options.proposal_window, task.num_steps) if options.num_proposals > 1 else ()
    target_ess = options.target_ess if options.scale is None else None
    weights = ParticleWeights(len(task), count, options.potential, options.scale or 0.0, target_ess)
    values = torch.full((task.num_steps, len(task)), float("nan"))
    carry: Carry | None = None
    for step, sigma, sigma_next in task.steps():
        velocity, pull = _velocity(task, options.guidance, step, latents, sigma, sigma_next, condition, carry)
        proposals = options.num_proposals if step in chooses else 1
        kept = propose(task, condition, latents, velocity, sigma, sigma_next, proposals, pull=pull)
        latents, found, carry = kept.latents, kept.values, kept.carry
        check_finite(step, sigma, latents=latents)
        if kept.log_ratio is not None:
            weights.correct(kept.log_ratio)
        if step in events and sigma_next > 0 and count > 1:
            if found is None:
                found, carry = task.denoiser.values(latents, sigma_next, condition, carry=True)
            weights.update(found)
            ancestors = weights.resample(task.noise.uniform(count), options.resampling, options.ess_threshold)
            rows = (ancestors + count * torch.arange(len(task))[:, None]).flatten().to(latents.device)
            latents, carry = latents[rows], carry.rows(rows) if carry else None
        if found is not None:
            values[step] = found.view(len(task), count).mean(1).cpu()
        task.on_step()
    rewards = task.rewards(latents, condition).view(len(task), count)
    weights.update(rewards, final=True)
    chosen = rewards.argmax(1).cpu()
    if options.select == "sample":
        chosen = torch.cat(
            [
                RESAMPLERS["multinomial"](w.softmax(0), u)
                for w, u in zip(weights.log_weights, task.noise.uniform(1), strict=True)
            ]
        )
    return sampled(task, values, latents, rewards, chosen, weights.log_weights, weights.log_evidence)


def _velocity(
    task: SamplingTask,
    guidance: Guidance | None,
    step: int,
    latents: Tensor,
    sigma: float,
    sigma_next: float,
    condition: Condition,
    carry: Carry | None,
) -> tuple[Tensor, Tensor | None]:
    """The velocity of classifier-free guidance and, at guided steps, what the value's gradient takes off it. A step
    without noise has no density, so it is not guided.
    """
    guided = guidance is not None and guidance.is_active(step, sigma) and task.is_random(sigma, sigma_next)
    if not guided:
        velocity = condition.guide(*task.denoiser.branches(latents, sigma, condition, carry)).float()
        check_finite(step, sigma, velocity=velocity)
        return velocity, None
    cond, uncond, value, grad = task.denoiser.branches_with_value(latents, sigma, condition)
    velocity = condition.guide(cond, uncond).float()
    check_finite(step, sigma, velocity=velocity, value=value, gradient=grad)
    return velocity, guidance.term(velocity, grad, sigma)


def _draws_noise(task: SamplingTask) -> bool:
    return any(task.is_random(sigma, sigma_next) for _, sigma, sigma_next in task.steps())
