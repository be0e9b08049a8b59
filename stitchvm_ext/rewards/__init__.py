"""Adapters of image rewards, found by the name of their class."""

from __future__ import annotations

from .base import RewardModel, RewardOutput
from .open_clip import AestheticReward, OpenClipReward

REGISTRY: dict[str, type[RewardModel]] = {"OpenClipReward": OpenClipReward, "AestheticReward": AestheticReward}
"""Adapter by the name under which ``describe()`` records it. A new reward is one class and one line here."""


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
    "REGISTRY",
    "AestheticReward",
    "OpenClipReward",
    "RewardModel",
    "RewardOutput",
    "reward_suffix_from_description",
]
