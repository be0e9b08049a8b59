"""Adapters of image rewards, found by the name of their class."""

from __future__ import annotations

from .base import RewardModel, RewardOutput
from .classifier import Dinov2Reward
from .distil import DistilConfig, distil_reward
from .distilled import DistilledReward
from .hf_clip import HFClipReward
from .image_reward import ImageReward
from .loading import KINDS, RewardKind, load_reward
from .open_clip import AestheticReward, OpenClipReward
from .siglip import SiglipReward
from .sum import RewardSum
from .timm_classifier import TimmReward
from .yolos import YolosReward

REGISTRY: dict[str, type[RewardModel]] = {
    reward.__name__: reward
    for reward in (
        AestheticReward,
        Dinov2Reward,
        DistilledReward,
        HFClipReward,
        ImageReward,
        OpenClipReward,
        SiglipReward,
        TimmReward,
        YolosReward,
    )
}
"""Adapter by the name under which ``describe()`` records it. A new reward is one class and one name here."""


def reward_suffix_from_description(description: dict, layer: int) -> RewardModel:
    """The suffix r_{>=j} that ``reward.describe()`` described, its weights not yet set: call ``load_state_dict`` next.

    Nothing but the description is read: not the original reward, not the network.

    Raises:
        ValueError: an unknown class name, or a layer the reward does not have.
    """
    name = description.get("class")
    if name not in REGISTRY:
        raise ValueError(f"description['class']: expected one of {sorted(REGISTRY)}, got {name!r}")
    return REGISTRY[name].suffix_from_config(description, layer)


__all__ = [
    "KINDS",
    "REGISTRY",
    "AestheticReward",
    "Dinov2Reward",
    "DistilConfig",
    "DistilledReward",
    "HFClipReward",
    "ImageReward",
    "OpenClipReward",
    "RewardKind",
    "RewardModel",
    "RewardOutput",
    "RewardSum",
    "SiglipReward",
    "TimmReward",
    "YolosReward",
    "distil_reward",
    "load_reward",
    "reward_suffix_from_description",
]
