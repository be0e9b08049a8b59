"""Diffusion-DPO (Wallace et al. 2024) for flow models, its pairs ranked on line by a value, clean or stitched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..value.base import ValueEstimator
from ..value.batches import seeded_generator
from .advantages import zero_variance
from .bridge import bridge, bridge_velocity, predicted_anchor, training_levels
from .config import TrainingConfig
from .health import check_finite, warn_constant
from .losses import dpo_loss
from .rollout import SOLVERS
from .samples import LEVELS, NOISE, Collected, check_processes, check_stop_window, collect, draw_stop, score
from .trainer import Trainer

SPACES = ("anchor", "velocity")
Pair = tuple[int, int]  # rows of a winner and a loser


@dataclass(frozen=True)
class DPOConfig(TrainingConfig):
    """Settings of :class:`DPOTrainer`.

    Attributes:
        prompts_per_iteration: P, groups of an iteration.
        group_size: G >= 2 samples of each prompt, which are ranked.
        pairs_per_group: up to G // 2: the best with the worst, the second best with the second worst, and so on.
        stop_window, solver: of rollouts, as in :class:`NFTConfig`.
        space: of the errors that the loss compares: "velocity", as in Diffusion-DPO with flows, bounded by the distance
            of a step of the schedule from the singularity at t -> tau; or "anchor", which weights them to take it away.
            See :mod:`training.bridge`.
        dpo_beta: how strongly a difference of errors counts: the larger, the nearer the policy stays to the model
            without the adapter. See :func:`training.losses.dpo_loss`.
        levels_per_pair: different noise levels above tau at which each pair is trained.
    """

    weight_decay: float = 1e-4
    prompts_per_iteration: int = 48
    group_size: int = 8
    pairs_per_group: int = 1
    stop_window: tuple[int, int] | None = None
    solver: str = "ode"
    space: str = "velocity"
    dpo_beta: float = 100.0
    levels_per_pair: int = 1

    def __post_init__(self):
        super().__post_init__()
        self._check_counts("prompts_per_iteration", "pairs_per_group", "levels_per_pair")
        if self.group_size < 2:
            raise ValueError(f"group_size: expected at least 2 samples to compare, got {self.group_size}")
        if self.pairs_per_group > self.group_size // 2:
            raise ValueError(
                f"pairs_per_group: expected at most {self.group_size // 2} of {self.group_size} samples, "
                f"got {self.pairs_per_group}"
            )
        self._check_positive("dpo_beta")
        self._check_choice("solver", SOLVERS)
        self._check_choice("space", SPACES)
        if self.stop_window is not None:
            self._check_window("stop_window")
        shortest = self.num_inference_steps if self.stop_window is None else self.stop_window[0]
        if self.levels_per_pair > shortest:
            raise ValueError(
                f"levels_per_pair: expected at most the {shortest} steps of the shortest rollout, "
                f"got {self.levels_per_pair}"
            )


def rank_pairs(rewards: Tensor, count: int) -> list[Pair]:
    """(winner, loser) rows, ``count`` per group: the k-th best with the k-th worst. Equal rewards make no pair.

    Args:
        rewards: [P, G], a row per prompt; the samples are numbered through.
    """
    order = rewards.argsort(dim=1, descending=True, stable=True).tolist()
    size, flat = rewards.shape[1], rewards.flatten().tolist()
    ranked = [(g * size + row[k], g * size + row[-1 - k]) for g, row in enumerate(order) for k in range(count)]
    return [(winner, loser) for winner, loser in ranked if flat[winner] > flat[loser]]


class DPOTrainer(Trainer):
    """Diffusion-DPO with pairs that the present policy draws and an estimator ranks.

    An iteration: the policy, its adapter merged, draws a group of samples for every prompt; the value ranks them; the
    policy learns to explain the better one's forward process more than the worse one's, relative to the model without
    the adapter. Both of a pair are noised by the same noise to the same levels.

    With a :class:`CleanReward` rollouts go to the end and are decoded. With a stitched value and ``stop_window`` the
    samples of a group stop at one tau, nothing is decoded, and the forward process starts at z_tau.

    With ``guidance_scale > 1`` the rollouts are guided; what is trained is the conditional branch alone.
    """

    config: DPOConfig

    def __init__(self, pipe, value: ValueEstimator, prompts, config: DPOConfig | None = None, **options):
        config = config or DPOConfig()
        check_stop_window(value, config)
        super().__init__(pipe, value, prompts, config, **options)
        check_processes(self)

    def iterate(self, iteration: int) -> dict[str, float]:
        config, size = self.config, self.config.group_size
        prompts = self.next_prompts(config.prompts_per_iteration)
        groups = self.share(config.prompts_per_iteration)  # whole groups: a pair's samples are in one process
        rows = range(groups.start * size, groups.stop * size)
        stops = [draw_stop(self, iteration, row // size) for row in rows]
        samples = collect(self, iteration, rows, prompts, stops, solver=config.solver, group_size=size)
        rewards, terms = score(self, iteration, samples)
        by_group = rewards.view(-1, size)
        pairs = rank_pairs(by_group, config.pairs_per_group)
        row = {
            "reward/mean": rewards.mean().item(),
            **{f"reward/{name}": scores.mean().item() for name, scores in terms.items()},
            "reward/std_within": by_group.std(1, correction=0).mean().item(),
            "zero_variance": zero_variance(by_group).double().mean().item(),
            "pairs": float(len(pairs)),
        }
        if not pairs:
            if self.state.is_main_process:
                warn_constant(iteration)
            return row | {"skipped": 1.0}
        winners, losers = zip(*pairs, strict=True)
        row["gap"] = (rewards[list(winners)] - rewards[list(losers)]).mean().item()
        means = self.total(**self._backward(iteration, samples, pairs))
        check_finite(iteration, **{f"the {name}": mean for name, mean in means.items()})
        return row | means | {"gradient_norm": self.apply_gradients(iteration)}

    def _backward(self, iteration: int, samples: Collected, pairs: list[Pair]) -> dict[str, Tensor]:
        """The gradient of the mean loss over all pairs and levels, this process's part of it, and of what is logged."""
        config = self.config
        mine = [pair for pair in pairs if pair[0] in samples.rows]
        passes = [(pair, number) for pair in mine for number in range(config.levels_per_pair)]
        sums = torch.zeros(3, dtype=torch.float64, device=samples.anchors.device)
        with self.base.fused():
            spare = (samples.rows[:2], 0)
            for part, counts in self.batches(passes, max(1, config.train_batch_size // 2), spare):
                loss, margin = self._losses(iteration, samples, part)
                (counts * loss.sum() / (len(pairs) * config.levels_per_pair)).backward()
                found = counts * torch.stack([loss.detach(), margin.detach(), (margin > 0).float()])
                sums += found.double().sum(1) / (len(pairs) * config.levels_per_pair)
        return dict(zip(("loss", "margin", "accuracy"), sums, strict=True))

    def _losses(self, iteration: int, samples: Collected, part: list[tuple[Pair, int]]) -> tuple[Tensor, Tensor]:
        """Loss and margin of each pass [B], a pair at one of its noise levels."""
        config, device = self.config, samples.anchors.device
        rows = [samples.rows.index(row) for pair, _ in part for row in pair]  # winner, loser, winner, ...
        levels, noise = [], []
        for (winner, loser), number in part:
            key = (config.seed, iteration, min(winner, loser))
            stop = samples.stops[samples.rows.index(winner)]
            drawn = training_levels(self.sigmas, stop, config.levels_per_pair, seeded_generator(*key, LEVELS))
            levels += [drawn[number]] * 2
            noise += [torch.randn(self.latent_shape, generator=seeded_generator(*key, NOISE + number))] * 2
        t, eps = torch.stack(levels).to(device), torch.stack(noise).to(device)
        anchor, tau = samples.anchors[rows], samples.tau[rows]
        latents, encoding = bridge(anchor, eps, tau, t), samples.conditions(rows).cond
        with torch.no_grad():
            reference = self.base.velocity(latents, t, encoding).float()
        with self.autocast():
            velocity = self.policy.velocity(latents, t, encoding)
        predictions, target = [velocity.float(), reference], bridge_velocity(anchor, eps, tau, t)
        if config.space == "anchor":
            predictions = [predicted_anchor(latents, u, tau, t) for u in predictions]
            target = anchor
        paired = [x.unflatten(0, (-1, 2)) for x in (*predictions, target)]
        return dpo_loss(*paired, config.dpo_beta)
