"""Settings that every trainer has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# What may differ between a run and the one that goes on from its checkpoint: where, when and how many steps are made.
EXECUTION = (
    "iterations", "rollout_batch_size", "train_batch_size", "gradient_checkpointing",
    "offload_text_encoders", "shard_frozen_weights", "eval_every", "eval_steps", "save_every",
    "keep_checkpoints",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run. One iteration samples, scores and makes one or more optimiser steps.

    Attributes:
        iterations: of the run in all.
        learning_rate, weight_decay: of AdamW; the rate is constant.
        max_grad_norm: the gradient is clipped to this norm.
        ema_decay: of the moving average of the trained weights, which is evaluated and exported; at optimiser step s
            it is at most ``(1 + s) / (10 + s)``.
        lora_rank, lora_alpha: of the adapter.
        lora_targets: a regular expression of the layers' whole names; by default the attention projections of the joint
            blocks (METHOD.md §6), or what comes closest to them in a backbone without joint blocks.
        num_inference_steps: of a rollout's schedule, the pipeline's own.
        guidance_scale: of rollouts and evaluation; 1 is none.
        height, width: in pixels; by default the pipeline's.
        max_sequence_length: rows of the text encoding; by default what the value's null text was encoded with.
        rollout_batch_size: samples that are denoised, decoded and scored together.
        train_batch_size: samples per forward and backward pass. Gradients are added up over passes and processes, so a
            step does not depend on it.
        mixed_precision: "no", or "bf16": the trained forward pass runs under autocast. Adapters are always float32.
        gradient_checkpointing: keep the inputs of the denoiser's blocks only, and run them twice.
        offload_text_encoders: keep those of the pipeline and of the rewards on the host between their uses. Leave the
            pipeline's there when you load it: ``pipe.transformer.to("cuda")`` and ``pipe.vae.to("cuda")`` are enough.
        shard_frozen_weights: split the frozen weights of the denoiser's blocks over the processes, by FSDP; a block is
            whole while it runs. Adapters, merged layers and all that is no block stay whole in every process. Leave the
            pipeline's denoiser on the host when you load it: it goes to the autoencoder's device. It remains split
            after training, and one process alone cannot call it.
        eval_every: iterations between evaluations; there is one before the first and one after the last.
        eval_steps: denoising steps of an evaluation's pictures, by the ODE.
        save_every, keep_checkpoints: iterations between checkpoints, and how many of them are kept.
        seed: of the adapter, the order of prompts and all noise.
    """

    iterations: int = 300
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_targets: str | None = None
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    height: int | None = None
    width: int | None = None
    max_sequence_length: int | None = None
    rollout_batch_size: int = 16
    train_batch_size: int = 8
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    offload_text_encoders: bool = False
    shard_frozen_weights: bool = False
    eval_every: int = 25
    eval_steps: int = 40
    save_every: int = 10
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self):
        self._check_counts(
            "iterations", "lora_rank", "lora_alpha", "num_inference_steps", "rollout_batch_size", "train_batch_size",
            "eval_every", "eval_steps", "save_every", "keep_checkpoints",
        )  # fmt: skip
        self._check_positive("learning_rate", "max_grad_norm")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected at least 0, got {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale: expected a finite number >= 0, got {self.guidance_scale}")
        self._check_choice("mixed_precision", ("no", "bf16"))

    @classmethod
    def for_12_gb(cls, **settings) -> TrainingConfig:
        """Settings with which a pipeline of SD 3.5 Medium's size, in bfloat16, trains at 512 pixels on a card of 12 GB.

        The prediction for SD 3.5 Medium, counted on fake tensors and not measured on a card: 9.1 GB stay (denoiser
        4.9, its merged layers 0.9, stitched values of DFN-CLIP and HPSv2 in bfloat16 2.5, autoencoder 0.2, adapters
        with their moving average and optimiser 0.5), and 1.4 GB come and go: a reward's text tower in float32; the
        trained pass and the decoding of an evaluation take 0.8 each. With 0.6 GB for a held-out reward on a ViT-L and
        0.5 GB for CUDA itself that is 11.6 of the card's 12.9 GB. Load values with ``dtype=torch.bfloat16``: they are
        float32 otherwise.

        Args:
            settings: others, by name; they come before those of the preset.
        """
        preset = {
            "height": 512, "width": 512, "mixed_precision": "bf16", "gradient_checkpointing": True,
            "offload_text_encoders": True, "rollout_batch_size": 2, "train_batch_size": 4,
        }  # fmt: skip
        return cls(**(preset | settings))

    def _check_counts(self, *names: str) -> None:
        for name in names:
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {count!r}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def _check_choice(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"{name}: expected one of {list(known)}, got {getattr(self, name)!r}")

    def _check_window(self, name: str) -> None:
        """A range (first, last) of a rollout's steps, both included, after which it may stop."""
        window = getattr(self, name)
        if (
            not isinstance(window, tuple | list)
            or len(window) != 2
            or not all(isinstance(step, int) for step in window)
            or not 1 <= window[0] <= window[1] <= self.num_inference_steps
        ):
            raise ValueError(
                f"{name}: expected (first, last) steps with 1 <= first <= last <= {self.num_inference_steps} "
                f"(num_inference_steps), got {window!r}"
            )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with, JSON-ready."""
        settings = {name: setting for name, setting in asdict(self).items() if name not in EXECUTION}
        return {"trainer": type(self).__name__, **settings}
