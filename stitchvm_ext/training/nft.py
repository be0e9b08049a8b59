"""DiffusionNFT (Zheng et al. 2025): online reinforcement learning on the forward process, clean or stitched."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..value.base import ValueEstimator
from ..value.batches import seeded_generator
from .advantages import STDS, group_advantages, optimality, zero_variance
from .bridge import bridge, bridge_velocity, predicted_anchor, training_levels
from .config import TrainingConfig
from .health import check_finite, warn_constant
from .lora import copy_adapter
from .losses import OLD_POLICY_DECAYS, nft_loss, old_policy_decay, velocity_distance
from .rollout import SOLVERS
from .samples import LEVELS, NOISE, Collected, check_stop_window, collect, draw_stop, score
from .trainer import Trainer

SPACES = ("anchor", "velocity")
_ORDER = (0, 0, 1)  # end of the key (seed, iteration, ...) of the samples' order; those of others are in samples.py


@dataclass(frozen=True)
class NFTConfig(TrainingConfig):
    """Settings of :class:`NFTTrainer`; the defaults are those of the published code for SD 3.5 Medium.

    Attributes:
        prompts_per_iteration: P, groups of an iteration.
        group_size: G >= 2 samples of each prompt, which are compared with each other.
        stop_window: (first, last) of the rollout's steps, both included, after which a group stops; each group's step
            is drawn uniformly. METHOD.md §6: (12, 17) of 25. None rolls out to the end.
        solver: of rollouts: "dpm_solver" (DPM-Solver++(2M)), "ode", "linear_sde" or "flow_grpo".
        space: of the loss: "anchor", between predictions of the state where the rollout stopped (of the clean latent,
            x0, without ``stop_window``), as in the published code; or "velocity", as in the papers. In "anchor" the
            target's singularity at t -> tau has weight 0; in "velocity" it is bounded by the distance of a step, since
            training takes place at the levels of the rollout's schedule above tau. See :mod:`training.bridge`.
        adaptive: divide each square error by its mean absolute error.
        mix_beta: beta, how far the implicit policies lie from the old one.
        kl_weight: of the squared distance to the velocity of the model without the adapter; at 0 that model is not
            run.
        advantage_std: rewards are divided by the standard deviation of all ("global") or of their group ("prompt").
        advantage_clip: advantages beyond it count as it.
        old_decay: schedule of the old policy, see :func:`training.losses.old_policy_decay`.
        timestep_fraction: share of the levels above tau at which each sample is trained, rounded down; drawn for each
            sample.
        updates_per_iteration: optimiser steps, each on its part of the samples.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    prompts_per_iteration: int = 48
    group_size: int = 24
    stop_window: tuple[int, int] | None = None
    solver: str = "dpm_solver"
    space: str = "anchor"
    adaptive: bool = True
    mix_beta: float = 1.0
    kl_weight: float = 1e-4
    advantage_std: str = "global"
    advantage_clip: float = 5.0
    old_decay: str = "linear"
    timestep_fraction: float = 0.99
    updates_per_iteration: int = 1

    def __post_init__(self):
        super().__post_init__()
        self._check_counts("prompts_per_iteration", "updates_per_iteration")
        if self.group_size < 2:
            raise ValueError(f"group_size: expected at least 2 samples to compare, got {self.group_size}")
        self._check_positive("mix_beta", "advantage_clip")
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight: expected at least 0, got {self.kl_weight}")
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction: expected a share in (0, 1], got {self.timestep_fraction}")
        if self.updates_per_iteration > self.samples:
            raise ValueError(
                f"updates_per_iteration: expected at most the {self.samples} samples, got {self.updates_per_iteration}"
            )
        for name, known in (
            ("solver", SOLVERS), ("space", SPACES), ("advantage_std", STDS), ("old_decay", tuple(OLD_POLICY_DECAYS)),
        ):  # fmt: skip
            self._check_choice(name, known)
        if self.stop_window is not None:
            self._check_window("stop_window")

    @property
    def samples(self) -> int:
        """Of an iteration."""
        return self.prompts_per_iteration * self.group_size

    def levels(self, stop: int) -> int:
        """How many noise levels a sample that stopped after ``stop`` steps is trained at."""
        return max(1, int(stop * self.timestep_fraction))


MEASURED = ("loss", "policy_loss", "kl", "velocity_change", "old_velocity")  # the last two are mean squares


class NFTTrainer(Trainer):
    """DiffusionNFT, with any estimator as reward.

    An iteration: the old policy draws a group of samples for every prompt, each as far as z_tau; the value scores them;
    rewards are compared within groups; the trained policy is moved towards good samples and away from bad ones on the
    forward process that starts at z_tau; the old policy follows by a moving average.

    With a :class:`CleanReward` rollouts go to the end (tau = 0) and are decoded. With a stitched value and
    ``stop_window`` they stop early, nothing is decoded, and the training passes cover t > tau alone.

    With ``guidance_scale > 1`` the rollouts are guided; what is trained is the conditional branch alone, whose
    velocity learns from the guided samples, and the old policy in the loss is not guided either.

    What runs: old policy and reference are views with merged or without adapters, whose blocks run fused; the value's
    prefix is the frozen model's, on the same weights; all terms of a ValueSum read one pass through it.
    """

    adapters = ("default", "old")
    config: NFTConfig

    def __init__(self, pipe, value: ValueEstimator, prompts, config: NFTConfig | None = None, **options):
        config = config or NFTConfig()
        check_stop_window(value, config)
        super().__init__(pipe, value, prompts, config, **options)
        if config.samples < self.state.num_processes:
            raise ValueError(
                f"prompts_per_iteration: expected at least a sample for each of {self.state.num_processes} processes, "
                f"got {config.samples} of all"
            )

    def iterate(self, iteration: int) -> dict[str, float]:
        config, began = self.config, time.perf_counter()
        prompts = self.next_prompts(config.prompts_per_iteration)
        samples = self._collect(iteration, prompts)
        rewards, terms = score(self, iteration, samples)
        collected = time.perf_counter()
        groups = rewards.view(config.prompts_per_iteration, config.group_size)
        equal = zero_variance(groups)
        row = {
            "reward/mean": rewards.mean().item(),
            **{f"reward/{name}": scores.mean().item() for name, scores in terms.items()},
            "reward/std_within": groups.std(1, correction=0).mean().item(),
            "zero_variance": equal.double().mean().item(),
            "rollout_seconds": collected - began,
        }
        if equal.all():
            if self.state.is_main_process:
                warn_constant(iteration)
            return row | {"skipped": 1.0}
        advantages = group_advantages(groups, config.advantage_std).flatten()
        row |= self._update(iteration, samples, optimality(advantages, config.advantage_clip))
        decay = old_policy_decay(config.old_decay, self.optimizer_steps)
        copy_adapter(self.policy.denoiser, "default", "old", keep=decay)
        return row | {"old_decay": decay, "train_seconds": time.perf_counter() - collected}

    # -- samples -------------------------------------------------------------------------------------------------------

    def _collect(self, iteration: int, prompts: list[str]) -> Collected:
        config = self.config
        rows = self.share(config.samples)
        stops = [draw_stop(self, iteration, row // config.group_size) for row in rows]
        options = {"adapter": "old", "solver": config.solver, "group_size": config.group_size}
        return collect(self, iteration, rows, prompts, stops, **options)

    # -- training ------------------------------------------------------------------------------------------------------

    def _update(self, iteration: int, samples: Collected, wanted: Tensor) -> dict[str, float]:
        """The iteration's optimiser steps. ``wanted``: r of all rows, [P*G] in [0, 1]."""
        config = self.config
        order = torch.randperm(config.samples, generator=seeded_generator(config.seed, iteration, *_ORDER))
        old, steps = self.merged("old"), []
        for chunk in order.tensor_split(config.updates_per_iteration):
            means = self.total(**self._backward(iteration, samples, chunk, wanted, old))
            check_finite(iteration, **{f"the {name}": means[name] for name in reversed(MEASURED)})
            steps.append(means | {"gradient_norm": self.apply_gradients(iteration)})
        means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        means["policy_change"] = (means.pop("velocity_change") / means.pop("old_velocity")) ** 0.5
        return means

    def _backward(self, iteration: int, samples: Collected, chunk: Tensor, wanted: Tensor, old) -> dict[str, Tensor]:
        """The gradient of the mean loss over the samples of ``chunk``, this process's part of it, and of what is
        MEASURED.
        """
        mine = [samples.rows.index(row) for row in chunk.sort().values.tolist() if row in samples.rows]
        levels = [self._levels(iteration, row, stop) for row, stop in zip(samples.rows, samples.stops, strict=True)]
        passes = [(k, number) for k in mine for number in range(len(levels[k]))]
        sums = torch.zeros(len(MEASURED), dtype=torch.float64, device=samples.anchors.device)
        with old.fused(), self.base.fused():
            for part, counts in self.batches(passes, self.config.train_batch_size, spare=(0, 0)):
                t = torch.stack([levels[k][number] for k, number in part])
                weights = torch.tensor([1 / (len(chunk) * len(levels[k])) for k, _ in part], device=sums.device)
                losses = self._losses(iteration, samples, part, t, wanted, old) * weights * counts
                losses[0].sum().backward()
                sums += losses.detach().double().sum(1)
        return dict(zip(MEASURED, sums, strict=True))

    def _levels(self, iteration: int, row: int, stop: int) -> Tensor:
        generator = seeded_generator(self.config.seed, iteration, row, LEVELS)
        return training_levels(self.sigmas, stop, self.config.levels(stop), generator)

    def _losses(
        self, iteration: int, samples: Collected, part: list[tuple[int, int]], t: Tensor, wanted: Tensor, old
    ) -> Tensor:
        """What is MEASURED of each pass, [5, B]; the first, the loss, is differentiable."""
        config, device = self.config, samples.anchors.device
        rows = [k for k, _ in part]
        generators = [seeded_generator(config.seed, iteration, samples.rows[k], NOISE + number) for k, number in part]
        noise = torch.stack([torch.randn(self.latent_shape, generator=g) for g in generators]).to(device)
        anchor, tau, t = samples.anchors[rows], samples.tau[rows], t.to(device)
        latents = bridge(anchor, noise, tau, t)
        encoding = samples.conditions(rows).cond
        with torch.no_grad():
            before = old.velocity(latents, t, encoding).float()
            reference = self.base.velocity(latents, t, encoding).float() if config.kl_weight else None
        with self.autocast():
            velocity = self.policy.velocity(latents, t, encoding)
        velocity = velocity.float()
        if config.space == "anchor":
            predictions = [predicted_anchor(latents, u, tau, t) for u in (velocity, before)]
            target = anchor
        else:
            predictions, target = [velocity, before], bridge_velocity(anchor, noise, tau, t)
        r = wanted[[samples.rows[k] for k in rows]].to(device)
        policy = config.advantage_clip * nft_loss(*predictions, target, r, config.mix_beta, config.adaptive)
        kl = velocity_distance(velocity, reference) if config.kl_weight else torch.zeros_like(policy)
        moved, size = velocity_distance(velocity.detach(), before), before.square().flatten(1).mean(1)
        return torch.stack([policy + config.kl_weight * kl, policy, kl, moved, size])
