"""Direct reward finetuning: DRaFT-K (Clark et al. 2024) with the clean reward, or with a stitched value on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones import expand_sigma
from ..value.base import ValueEstimator
from .config import TrainingConfig
from .health import check_finite
from .rewards import scores_by_term
from .samples import Collected, check_processes, check_stop_window, collect, draw_stop, gather_table, table
from .trainer import Trainer


@dataclass(frozen=True)
class DraftConfig(TrainingConfig):
    """Settings of :class:`DraftTrainer`; the defaults are those of METHOD.md §6.

    Attributes:
        prompts_per_iteration: samples of an iteration, one for each prompt.
        last_steps: K, how many steps before the end, or before the stop, are differentiated.
        stop_window: (first, last) of the rollout's steps, both included, after which a sample stops and is scored;
            each sample's step is drawn uniformly. METHOD.md §6: (3, 7) of 10. None rolls out to the end.
        kl_weight: of the squared distance to the velocity of the model without the adapter, the mean over the
            differentiated steps; at 0 that model is not run.
    """

    learning_rate: float = 5e-5
    prompts_per_iteration: int = 32
    last_steps: int = 1
    stop_window: tuple[int, int] | None = None
    kl_weight: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        self._check_counts("prompts_per_iteration", "last_steps")
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight: expected at least 0, got {self.kl_weight}")
        if self.stop_window is not None:
            self._check_window("stop_window")
        shortest = self.num_inference_steps if self.stop_window is None else self.stop_window[0]
        if self.last_steps >= shortest:
            raise ValueError(
                f"last_steps: expected fewer than the {shortest} steps of the shortest rollout, got {self.last_steps}"
            )


Velocity = Callable[[Tensor, Tensor], Tensor]


def differentiable_steps(
    velocity: Velocity, reference: Velocity | None, latents: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """K Euler steps, differentiable from end to end.

    Args:
        velocity, reference: ``(latents, sigma [B]) -> velocity``.
        latents: [B, ...], where the first of the steps begins.
        levels: noise levels [K+1, B]; the samples may be at different places of the schedule.

    Returns:
        the latents after the last step, and the mean square of ``velocity - reference`` over elements and steps, [B].
        Its gradient is the whole one: later steps start from latents that depend on the parameters, for both.
    """
    distance = latents.new_zeros(len(latents))
    for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
        u = velocity(latents, sigma)
        if reference is not None:
            distance = distance + (u - reference(latents, sigma)).square().flatten(1).mean(1) / (len(levels) - 1)
        latents = latents + expand_sigma(sigma_next - sigma, latents) * u
    return latents, distance


class DraftTrainer(Trainer):
    """DRaFT-K / AlignProp, with any estimator as reward.

    An iteration: the policy, its adapter merged, rolls a sample out for every prompt without a gradient; the last
    ``last_steps`` steps are taken by the trained model; the value of where they lead is raised by its gradient.

    With a :class:`CleanReward` these are the schedule's last steps, and the gradient comes through the decoder. With a
    stitched value and ``stop_window`` they are those before the stop: steps at all noise levels of the window are
    trained, nothing is decoded, and the value's gradient comes through the frozen model's first blocks alone.

    With ``guidance_scale > 1`` all steps are guided, the differentiated ones through both branches.
    """

    config: DraftConfig

    def __init__(self, pipe, value: ValueEstimator, prompts, config: DraftConfig | None = None, **options):
        config = config or DraftConfig()
        check_stop_window(value, config)
        super().__init__(pipe, value, prompts, config, **options)
        check_processes(self)

    def iterate(self, iteration: int) -> dict[str, float]:
        config = self.config
        prompts = self.next_prompts(config.prompts_per_iteration)
        rows = self.share(config.prompts_per_iteration)
        starts = [draw_stop(self, iteration, row) - config.last_steps for row in rows]
        samples = collect(self, iteration, rows, prompts, starts)
        scored: list[dict[str, float]] = []
        for part, counts in self.batches(range(len(rows)), config.train_batch_size):
            columns = self.losses(samples, part)
            if not columns["reward/mean"].requires_grad:
                raise ValueError(f"value: expected one with a gradient, got {type(self.value).__name__} without")
            (counts * columns["loss"].sum() / config.prompts_per_iteration).backward()
            scored += table(columns) if counts else []
        columns = gather_table(self, scored)
        check_finite(iteration, **columns)
        del columns["latents"]
        row = {name: column.mean().item() for name, column in columns.items()}
        return row | {"gradient_norm": self.apply_gradients(iteration)}

    def losses(self, samples: Collected, part: list[int]) -> dict[str, Tensor]:
        """Of some samples, by name, [B] each: the latents' sum, rewards, "kl" and the differentiable "loss"."""
        config, condition = self.config, samples.conditions(part)
        latents = samples.anchors[part]
        levels = torch.stack([self.sigmas[samples.stops[k] :][: config.last_steps + 1] for k in part], 1)
        levels = levels.to(latents.device)

        def velocity(z: Tensor, sigma: Tensor) -> Tensor:
            with self.autocast():
                return self.policy.guided_velocity(z, sigma, condition).float()

        def reference(z: Tensor, sigma: Tensor) -> Tensor:
            return self.base.guided_velocity(z, sigma, condition).float()

        latents, distance = differentiable_steps(velocity, reference if config.kl_weight else None, latents, levels)
        reward, terms = scores_by_term(self.value, latents, levels[-1], condition)
        return {
            "latents": latents.flatten(1).sum(1),
            **{f"reward/{name}": scores for name, scores in terms.items()},
            "reward/mean": reward,
            "kl": distance,
            "loss": config.kl_weight * distance - reward,
        }
