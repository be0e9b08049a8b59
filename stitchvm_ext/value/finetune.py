"""Stage 2: multi-level distillation of the clean reward into the stitched value (METHOD.md §4)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..backbones import Encoding, expand_rows, expand_sigma, is_same_encoding
from ..backbones.identity import fingerprint
from ..rewards.base import RewardModel, RewardOutput
from .batches import Batch, StepData, read_ahead, read_batch
from .distillation import distillation_loss
from .processes import from_main, mean_over, processes
from .stitched import StitchedValue, rows_read_by
from .targets import DistillationTargets
from .training_state import load_state, save_state

# What may differ between a run and the one that goes on from its state: it changes where and when steps are computed.
EXECUTION = ("gradient_accumulation_steps", "encode_batch_size", "save_every")


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of stage 2; the defaults are METHOD.md's for the real models.

    Attributes:
        epochs: passes over the images (15 for the baseline without the backbone).
        batch_size: images per optimiser step, of all processes together.
        learning_rate: of the reward suffix; the stitching layer's is ``stitch_multiplier`` times that.
        stitch_multiplier: of the stitching layer's learning rate.
        warmup_steps: linear warm-up.
        final_share: the rate falls linearly to this share of itself; 1 keeps it constant, as METHOD.md has it.
        max_grad_norm: the gradients of each value are clipped to this norm.
        save_every: steps between resumable states.
        seed: of batches, noise levels and noise.
        gradient_accumulation_steps: forward and backward passes per optimiser step in each process; a pass has
            ``batch_size / (processes * gradient_accumulation_steps)`` images.
        encode_batch_size: images per pass of the autoencoder and of the teacher, when targets are computed.
        mixed_precision: "no", or "bf16": the stitch and the suffix run under autocast, their weights stay float32.
        prompt_share: share of the batches in which the backbone reads the images' own captions, not the null text; more
            than 0 makes the value prompt-conditioned.
    """

    epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 1e-5
    stitch_multiplier: float = 5.0
    warmup_steps: int = 100
    final_share: float = 1.0
    max_grad_norm: float = 1.0
    save_every: int = 200
    seed: int = 0
    gradient_accumulation_steps: int = 1
    encode_batch_size: int = 16
    mixed_precision: str = "no"
    prompt_share: float = 0.0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "save_every", "gradient_accumulation_steps", "encode_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "stitch_multiplier", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f'mixed_precision: expected "no" or "bf16", got {self.mixed_precision!r}')
        if not 0 <= self.prompt_share <= 1:
            raise ValueError(f"prompt_share: expected a share in [0, 1], got {self.prompt_share}")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps: expected a divisor of batch_size {self.batch_size}, "
                f"got {self.gradient_accumulation_steps}"
            )

    def rate(self, step: int, total: int) -> float:
        """The multiplier of both learning rates at a step."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * (1 - (1 - self.final_share) * step / total)

    def check_processes(self, count: int) -> None:
        """Raises ValueError unless ``count`` processes can share a batch equally."""
        if self.batch_size % (count * self.gradient_accumulation_steps):
            raise ValueError(
                f"batch_size: expected a multiple of processes * gradient_accumulation_steps = {count} * "
                f"{self.gradient_accumulation_steps}, got {self.batch_size}"
            )


class _Trained(nn.Module):
    """Stitch and suffix of every value: what data parallelism wraps. Backbone and null text are no part of it."""

    def __init__(self, values: Sequence[StitchedValue]):
        super().__init__()
        self.parts = nn.ModuleList(nn.ModuleList([value.stitch, value.suffix]) for value in values)
        object.__setattr__(self, "values", tuple(values))

    def forward(self, tokens: list[Tensor]) -> list[RewardOutput]:
        return [value(t) for value, t in zip(self.values, tokens, strict=True)]


def finetune(
    values: StitchedValue | Sequence[StitchedValue],
    teachers: RewardModel | Sequence[RewardModel],
    targets: DistillationTargets,
    config: FinetuneConfig | None = None,
    *,
    state_path: str | Path | None = None,
    stop_at: int | None = None,
    progress: bool = True,
) -> dict[str, list[float]] | list[dict[str, list[float]]]:
    """Train stitch and suffix in place, in float32; backbone and teacher stay frozen.

    Several values of one backbone read one pass through its first blocks per batch, and are trained as each would be
    alone: losses and clipping are separate.

    Under ``torchrun`` or ``accelerate launch`` every process takes its part of every batch, and all end with the same
    weights. A state is saved to ``state_path`` by the main process every ``save_every`` steps and at the end; a call
    that finds one goes on from there, with as many processes as it has, and ends with the weights of an uninterrupted
    run, since every step's data follow from (seed, step).

    Args:
        values: one, or several on one backbone, for one latent size and one null text.
        teachers: the clean reward of each value.
        targets: of these teachers, in their order.
        stop_at: end after this many steps in all, with the state saved.
    Returns:
        every loss term's mean over each tenth of the run: a dictionary per value, or the one of the single value.
    Raises:
        FloatingPointError: a loss is not finite; names the step and the term.
        OSError: ``state_path`` holds the state of another run, or is not seen by all processes.
        ValueError: values, teachers and targets that do not belong together.
    """
    config = config or FinetuneConfig()
    single = isinstance(values, StitchedValue)
    values, teachers = ([values], [teachers]) if single else (list(values), list(teachers))
    _check(values, teachers, targets, config)
    device = values[0].backbone.device
    state = processes(device)
    config.check_processes(state.num_processes)
    total = config.epochs * (len(targets) // config.batch_size)

    parameters = [prepare_training(value) for value in values]
    optimizer = torch.optim.AdamW(
        [
            {"params": part, "lr": config.learning_rate * factor}
            for stitch, suffix in parameters
            for part, factor in ((stitch, config.stitch_multiplier), (suffix, 1.0))
        ],
        weight_decay=0.0,
        fused=True,
    )
    base_rates = [group["lr"] for group in optimizer.param_groups]
    run = _identity(values, targets, config)
    start, history = load_state(state_path, values, optimizer, run)
    if from_main(state, start) != start:
        raise OSError(f"state_path: {state_path} is not the same file for all processes")
    stop = min(total, stop_at or total)
    module = trained = _Trained(values)
    if state.num_processes > 1:
        module = DistributedDataParallel(
            trained,
            device_ids=[device] if device.type == "cuda" else None,
            # A reward may have weights that distillation does not reach. And gradients keep one order in their buckets,
            # so that a resumed run adds them up as an uninterrupted one does.
            find_unused_parameters=True,
        )

    # Pass p of a step, of all passes in all processes, has the rows p, p + passes, p + 2 passes ...
    passes = state.num_processes * config.gradient_accumulation_steps
    own = [torch.arange(p, config.batch_size, passes) for p in range(state.process_index, passes, state.num_processes)]
    steps = (
        StepData.of(config.seed, step, len(targets), config.batch_size, config.prompt_share)
        for step in range(start, stop)
    )
    batches = read_ahead(partial(read_batch, targets, data, rows) for data in steps for rows in own)
    bar = tqdm(
        range(start, stop), initial=start, total=stop, desc="finetune", disable=not (progress and state.is_main_process)
    )
    for step in bar:
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * config.rate(step, total)
        summed: dict[tuple[int, str], Tensor] = {}
        for number, batch in enumerate(islice(batches, len(own)), 1):
            tokens, wanted = _enter(values, batch, device)
            with nullcontext() if number == len(own) or module is trained else module.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                    outputs = module(tokens)
                losses = {
                    (k, name): loss / len(own)
                    for k, (teacher, output) in enumerate(zip(teachers, outputs, strict=True))
                    for name, loss in distillation_loss(teacher, output, *wanted[k]).items()
                }
                sum(losses.values()).backward()
            for key, loss in losses.items():
                summed[key] = summed.get(key, 0) + loss.detach()
        means = mean_over(state, torch.stack(list(summed.values()))).tolist()
        for (k, name), loss in zip(summed, means, strict=True):
            if not np.isfinite(loss):
                raise FloatingPointError(f"finetune: the {name} loss is {loss} at step {step}")
            history[k].setdefault(name, []).append(loss)
        for stitch, suffix in parameters:
            torch.nn.utils.clip_grad_norm_(stitch + suffix, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            bar.set_postfix({name: f"{loss:.4f}" for (_, name), loss in zip(summed, means, strict=True)})
        if state_path and state.is_main_process and ((step + 1) % config.save_every == 0 or step + 1 == stop):
            save_state(state_path, values, optimizer, run, step + 1, history)
    state.wait_for_everyone()
    for value in values:
        value.requires_grad_(False)
    tenth = max(1, total // 10)
    means = [
        {name: [float(np.mean(v[k : k + tenth])) for k in range(0, len(v), tenth)] for name, v in terms.items()}
        for terms in history
    ]
    return means[0] if single else means


def _check(
    values: list[StitchedValue], teachers: list[RewardModel], targets: DistillationTargets, config: FinetuneConfig
) -> None:
    if not len(values) == len(teachers) == len(targets.teachers):
        raise ValueError(
            f"values: expected as many as teachers and targets, got {len(values)}, {len(teachers)} and "
            f"{len(targets.teachers)}"
        )
    first = values[0]
    for number, value in enumerate(values):
        if value.backbone.denoiser is not first.backbone.denoiser or value.latent_size != first.latent_size:
            raise ValueError(f"values: expected one backbone and latent size, got others at position {number}")
        if not is_same_encoding(value.null_condition, first.null_condition):
            raise ValueError(f"values: expected one null text, got another one at position {number}")
        if value.prompt_conditioned != (config.prompt_share > 0):
            raise ValueError(
                f"prompt_share: expected more than 0 for prompt-conditioned values and 0 for others, got "
                f"{config.prompt_share} and prompt_conditioned={value.prompt_conditioned} at position {number}"
            )
    if config.prompt_share and targets.text is None:
        raise ValueError("prompt_share: expected targets with encoded captions, got none (text_options)")
    if len(targets) < config.batch_size:
        raise ValueError(f"batch_size: expected at most the {len(targets)} images, got {config.batch_size}")


def prepare_training(value: StitchedValue) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of stitch and suffix, in float32.

    The value stays in evaluation mode: dropout would draw numbers that do not follow from (seed, step).
    """
    value.stitch.float()
    value.suffix.float()
    value.eval().requires_grad_(True)
    for p in value.suffix.head_parameters():
        p.requires_grad_(False)
    return list(value.stitch.parameters()), [p for p in value.suffix.parameters() if p.requires_grad]


def _identity(values: list[StitchedValue], targets: DistillationTargets, config: FinetuneConfig) -> dict[str, Any]:
    """What a saved state must agree with."""
    deepest = max(value.depth for value in values)
    backbone = json.dumps(fingerprint(values[0].backbone, deepest))
    return {
        **{name: setting for name, setting in asdict(config).items() if name not in EXECUTION},
        "depth": [value.depth for value in values],
        "layer": [value.layer for value in values],
        "targets": targets.digest,
        "backbone": hashlib.sha256(backbone.encode()).hexdigest(),
    }


@torch.no_grad()
def _enter(
    values: list[StitchedValue], batch: Batch, device: torch.device
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The tokens that each value's stitch reads, and each teacher's tokens and embeddings in float32, on the device."""
    clean, sigma = batch.clean.to(device), batch.sigma.to(device)
    mix = expand_sigma(sigma, clean)
    noisy = (1 - mix) * clean + mix * batch.noise.to(device)
    encoding = expand_rows(values[0].null_condition, len(clean))
    if batch.encoding is not None:
        encoding = {name: rows.to(device) for name, rows in batch.encoding.items()}
    wanted = [(tokens.to(device).float(), embeddings.to(device)) for tokens, embeddings in batch.wanted]
    return prefix_tokens(values, noisy, sigma, encoding), wanted


def prefix_tokens(values: Sequence[StitchedValue], latents: Tensor, sigma: Tensor, encoding: Encoding) -> list[Tensor]:
    """What :meth:`StitchedValue.tokens` gives for each value, from one pass through the backbone."""
    depths = sorted({value.depth for value in values if value.depth})
    if depths:
        rows = rows_read_by([value for value in values if value.depth == depths[-1]], latents)
        found = values[0].backbone.features_at(latents, sigma, encoding, depths, rows=rows)
    return [value.by_frame(found[value.depth]) if value.depth else value.tokens(latents, sigma) for value in values]
