"""An iteration's samples, as all trainers draw them: rolled out to z_tau, and scored there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones import Condition
from ..value.base import ValueEstimator
from ..value.batches import seeded_generator
from .config import TrainingConfig
from .health import check_finite
from .rewards import CleanReward, scores_by_term
from .rollout import roll_out
from .trainer import Trainer

# Ends of the keys (seed, iteration, row, ...) of what is drawn; a rollout's noise has the key without an end, which is
# the same as one that ends with 0. From NOISE on they are those of the noise of training passes.
STOP, LEVELS, NOISE = 1, 2, 3


@dataclass
class Collected:
    """This process's samples of an iteration.

    Attributes:
        rows: their numbers among all.
        anchors: z_tau [R, C, H, W]; tau: [R].
        stops: steps taken, by row.
        condition: a row per prompt; ``places`` says which one belongs to each sample.
    """

    rows: range
    anchors: Tensor
    tau: Tensor
    stops: list[int]
    condition: Condition
    places: list[int]

    def conditions(self, samples: Sequence[int]) -> Condition:
        """A row for each of these samples, numbered from 0 in this process."""
        return self.condition.rows([self.places[k] for k in samples])


def draw_stop(trainer: Trainer, iteration: int, group: int) -> int:
    """After how many steps a group of samples stops: uniform in ``config.stop_window``, the last step without one."""
    config = trainer.config
    if config.stop_window is None:
        return config.num_inference_steps
    first, last = config.stop_window
    generator = seeded_generator(config.seed, iteration, group, STOP)
    return int(torch.randint(first, last + 1, (), generator=generator))


def collect(
    trainer: Trainer,
    iteration: int,
    rows: range,
    prompts: Sequence[str],
    stops: Sequence[int],
    *,
    adapter: str = "default",
    solver: str = "ode",
    group_size: int = 1,
) -> Collected:
    """Roll these rows out, as far as their ``stops``, with an adapter merged.

    Args:
        prompts: of the whole iteration, one per ``group_size`` rows.
    """
    first = rows.start // group_size
    condition = trainer.encode(prompts[first : (rows.stop - 1) // group_size + 1])
    places = [row // group_size - first for row in rows]
    backbone = trainer.merged(adapter)
    longest = max(trainer.gather([max(stops)])) if trainer.sharded else 0
    parts = []
    for part, counts in trainer.batches(range(len(rows)), trainer.config.rollout_batch_size):
        rolled = roll_out(
            backbone,
            condition.rows([places[k] for k in part]),
            trainer.sigmas,
            trainer.generators(iteration, [rows[k] for k in part]),
            trainer.latent_shape,
            solver,
            [stops[k] for k in part],
            longest,
        )
        parts += [rolled] if counts else []
    anchors, tau = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Collected(rows, anchors, tau.to(anchors.device), list(stops), condition, places)


@torch.no_grad()
def score(trainer: Trainer, iteration: int, samples: Collected) -> tuple[Tensor, dict[str, Tensor]]:
    """Rewards of all processes' rows and every term's own, float64, in all processes.

    Raises:
        FloatingPointError: a latent or a score is not finite.
    """
    scored: list[dict[str, float]] = []
    for part, counts in trainer.batches(range(len(samples.rows)), trainer.config.rollout_batch_size):
        anchors = samples.anchors[part]
        total, terms = scores_by_term(trainer.value, anchors, samples.tau[part], samples.conditions(part))
        scored += table({"latents": anchors.flatten(1).sum(1), **terms, "reward": total}) if counts else []
    found = gather_table(trainer, scored)
    check_finite(iteration, **found)
    del found["latents"]
    return found.pop("reward"), found


def table(columns: dict[str, Tensor]) -> list[dict[str, float]]:
    """Columns [B] by name -> a dict of numbers per row."""
    numbers = torch.stack([column.detach().double() for column in columns.values()]).T.tolist()
    return [dict(zip(columns, row, strict=True)) for row in numbers]


def gather_table(trainer: Trainer, rows: list[dict[str, float]]) -> dict[str, Tensor]:
    """This process's rows -> columns of all processes' rows, float64."""
    rows = trainer.gather(rows)
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def check_stop_window(value: ValueEstimator, config: TrainingConfig) -> None:
    """Raises ValueError for a clean reward of latents that are not clean."""
    if isinstance(value, CleanReward) and config.stop_window is not None:
        raise ValueError(
            f"stop_window: expected None with a clean reward, which reads clean latents, got {config.stop_window}"
        )


def check_processes(trainer: Trainer) -> None:
    """Raises ValueError where a process would have no prompt."""
    count, processes = trainer.config.prompts_per_iteration, trainer.state.num_processes
    if count < processes:
        raise ValueError(f"prompts_per_iteration: expected at least {processes}, one for each process, got {count}")
