"""Noise levels and loss of stage 2 (METHOD.md §4)."""

from __future__ import annotations

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
