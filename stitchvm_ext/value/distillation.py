"""What a step of stage 2 trains on, and the loss (METHOD.md §4)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..rewards.base import RewardModel, RewardOutput


def centre_biased_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [B] in (0, 1), denser in the middle: logit-normal(0, 1), one from each of ``count`` equal
    quantiles.
    """
    quantiles = ((torch.arange(count) + torch.rand(count, generator=generator)) / count).clamp(1e-4, 1 - 1e-4)
    return torch.sigmoid(torch.special.ndtri(quantiles))


def distillation_loss(
    teacher: RewardModel, output: RewardOutput, tokens: Tensor, embeddings: Tensor
) -> dict[str, Tensor]:
    """The terms of the loss, to be summed (METHOD.md §4).

    Squared L2 is summed over an embedding's dimensions, which have unit length together, and averaged over the channels
    of tokens, which do not: summed as well, the tokens would drown the embedding that the reward reads.

    Args:
        teacher: its ``distillation`` names the loss: "embedding" for CLIP-like rewards, "score" for a scalar head.
        tokens, embeddings: the teacher's output tokens and normalised embeddings on the clean images.
    """
    if teacher.distillation == "embedding":
        return {
            "tokens": F.mse_loss(output.tokens.float(), tokens),
            "embedding": (output.normalized - embeddings).square().sum(-1).mean(),
        }
    target_score = teacher.score(RewardOutput(tokens, embeddings), None)
    return {
        "tokens": F.smooth_l1_loss(output.tokens.float(), tokens),
        "embedding": F.smooth_l1_loss(output.normalized, embeddings),
        "score": F.smooth_l1_loss(teacher.score(output, None), target_score),
    }


@dataclass(frozen=True)
class StepData:
    """Images, noise levels and noise of one optimiser step. They follow from (seed, step) alone, so that a step is the
    same however many processes share it and whenever it is run.

    Attributes:
        index: the images, int64 [B]: a fresh permutation every epoch, the incomplete last batch dropped.
        sigma: noise levels [B].
        prompted: whether the backbone reads the images' own captions in this step.
    """

    seed: int
    step: int
    index: Tensor
    sigma: Tensor
    prompted: bool

    @classmethod
    def of(cls, seed: int, step: int, count: int, batch_size: int, prompt_share: float) -> StepData:
        """The data of a step over ``count`` images."""
        epoch, position = divmod(step, max(1, count // batch_size))
        order = _order(seed, epoch, count)
        index = torch.from_numpy(order[position * batch_size : (position + 1) * batch_size])
        generator = _generator(seed, step)
        sigma = centre_biased_sigmas(len(index), generator)
        prompted = torch.rand((), generator=generator).item() < prompt_share
        return cls(seed, step, index, sigma, prompted)

    def noise(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Noise [R, *shape] of some rows of the step, each from a generator of its own."""
        draws = [torch.randn(tuple(shape), generator=_generator(self.seed, self.step, r)) for r in rows.tolist()]
        return torch.stack(draws)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
