"""Stitched value models for diffusion alignment (StitchVM). The public names; what they need is imported when first
used.
"""

from __future__ import annotations

import importlib

from ._version import __version__

_HOME = {
    "AestheticReward": "rewards",
    "CleanReward": "training",
    "DPOConfig": "training",
    "DPOTrainer": "training",
    "DistilConfig": "rewards",
    "DistilledReward": "rewards",
    "DraftConfig": "training",
    "DraftTrainer": "training",
    "FKSteeringCallback": "sampling.callbacks",
    "FinetuneConfig": "value",
    "ImageReward": "rewards",
    "MonteCarloValue": "value",
    "NFTConfig": "training",
    "NFTTrainer": "training",
    "OpenClipReward": "rewards",
    "RewardSum": "rewards",
    "ScheduledValue": "value",
    "StitchedValue": "value",
    "TweedieValue": "value",
    "ValueEstimator": "value",
    "ValueGuidance": "sampling.guider",
    "ValueGuidanceCallback": "sampling.callbacks",
    "ValueSum": "value",
    "apply_value_guidance": "sampling",
    "as_reward_fn": "training",
    "backbone_of": "backbones",
    "cache_rollouts": "value",
    "distil_reward": "rewards",
    "encode_prompts": "sampling",
    "calibrate": "sampling",
    "evaluate_noise_levels": "evaluation",
    "finetune": "value",
    "fuse": "fused.fuse",
    "guided_sample": "sampling",
    "load_reward": "rewards",
    "precompute_conditioning": "backbones",
    "read_evaluation_set": "evaluation",
    "remove_value_guidance": "sampling",
    "sample_prompts": "sampling",
    "search_stitch": "value",
    "stitch": "value",
    "unfuse": "fused.fuse",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
