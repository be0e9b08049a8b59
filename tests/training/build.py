"""Trainers on the small models, for the tests and for the program that they start."""

from __future__ import annotations

import copy
from dataclasses import fields

import torch

from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.training import CleanReward, DPOConfig, DPOTrainer, DraftConfig, DraftTrainer, NFTConfig, NFTTrainer
from stitchvm_ext.value import ValueSum, search_stitch
from stitchvm_ext.value.stitching import untrained_value
from tests import tiny

TEXT = {"max_sequence_length": 0}
PROMPTS = ["a red circle", "two blue squares", "a ring", "a small green ring", "three red rings"]
COMMON = {
    "iterations": 3, "learning_rate": 3e-3, "lora_rank": 4, "lora_alpha": 8, "num_inference_steps": 5,
    "max_sequence_length": 0, "rollout_batch_size": 5, "train_batch_size": 8, "eval_every": 2, "eval_steps": 2,
    "save_every": 1, "prompts_per_iteration": 2, "group_size": 3, "old_decay": "delayed",
}  # fmt: skip
METHODS = {"nft": (NFTTrainer, NFTConfig), "draft": (DraftTrainer, DraftConfig), "dpo": (DPOTrainer, DPOConfig)}


def stitched_value(pipe, *depths: int, reward=None):
    """Untrained stitched values of a reward, by default the small one, on a pipeline, one per depth; the sum of
    several.
    """
    backbone, reward = backbone_of(pipe), reward or tiny.tiny_reward()
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    null = backbone.null_condition(pipe, **TEXT)
    latents = backbone.encode_images(pipe.vae, images)
    search = search_stitch(backbone, reward, latents, images, null, layers=[1], progress=False)
    torch.manual_seed(5)
    values = [untrained_value(pipe, reward, search, depth, 1, (16, 16), null, TEXT) for depth in depths]
    for value in values:
        value.eval().requires_grad_(False)
    return values[0] if len(values) == 1 else ValueSum([(value, 1.0) for value in values])


def build(folder, *, method: str = "nft", stitched: bool = False, depths=(2,), value=None, trackers=None, **settings):
    """A trainer on a pipeline of its own; those of COMMON's settings that its method has."""
    trainer, settings_of = METHODS[method]
    pipe, reward = copy.deepcopy(tiny.tiny_pipeline()), tiny.tiny_reward()
    if stitched:
        settings = {"stop_window": (2, 4), **settings}
    value = value or (stitched_value(pipe, *depths) if stitched else CleanReward(pipe, reward))
    known = {field.name for field in fields(settings_of)}
    config = settings_of(**({name: x for name, x in COMMON.items() if name in known} | settings))
    held_out = {"clip": tiny.tiny_reward(2)}
    return trainer(
        pipe, value, PROMPTS, config, output_dir=folder, held_out=held_out, trackers=trackers,
        eval_prompts=["a green ring", "two rings"],
    )  # fmt: skip


def weights(trainer) -> dict[str, torch.Tensor]:
    """Everything that training changes: every adapter, the moving average and the optimiser's moments."""
    found = {
        f"{name}.{key}": tensor.clone()
        for name in trainer.adapters
        for key, tensor in trainer.adapter_state(name).items()
    }
    found |= {f"ema.{k}": tensor.clone() for k, tensor in enumerate(trainer.ema.shadow_params)}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{key}": tensor.clone() for key, tensor in state.items()}
    return found


def comparable(rows: list[dict]) -> list[dict]:
    """A log without its timings."""
    return [{name: number for name, number in row.items() if "seconds" not in name} for row in rows]
