"""Rewards compared within groups, the samples of one prompt, as Flow-GRPO and DiffusionNFT do."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-4  # added to every standard deviation, as the published code does
STDS = ("global", "prompt")


def group_advantages(rewards: Tensor, std: str = "global") -> Tensor:
    """``(reward - mean of its group) / (std + 1e-4)``.

    Args:
        rewards: [P, G], a row per prompt.
        std: "global" divides by the standard deviation of all rewards, "prompt" by that of the group; both with ddof 0.

    Returns:
        float32 [P, G].
    """
    rewards = rewards.double()
    spread = rewards.std(correction=0) if std == "global" else rewards.std(1, correction=0, keepdim=True)
    return ((rewards - rewards.mean(1, keepdim=True)) / (spread + EPS)).float()


def zero_variance(rewards: Tensor) -> Tensor:
    """Whether all rewards of a group are equal, [P]: such a group teaches nothing."""
    return rewards.amax(1) == rewards.amin(1)


def optimality(advantages: Tensor, clip: float) -> Tensor:
    """``r = 1/2 + clip(A / clip, -1, 1) / 2``, in [0, 1] (METHOD.md §6)."""
    return 0.5 + 0.5 * torch.clamp(advantages / clip, -1, 1)
