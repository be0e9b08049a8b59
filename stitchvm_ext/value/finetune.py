"""Stage 2: multi-level distillation of the clean reward into the stitched value (METHOD.md §4)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..backbones import expand_sigma
from ..backbones.identity import fingerprint
from ..rewards.base import RewardModel, RewardOutput
from .stitched import StitchedValue
from .targets import DistillationTargets


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of stage 2; the defaults are METHOD.md's for the real models.

    Attributes:
        epochs: passes over the images (15 for the baseline without the backbone).
        batch_size: images per step.
        learning_rate: of the reward suffix; the stitching layer's is ``stitch_multiplier`` times that.
        stitch_multiplier: of the stitching layer's learning rate.
        warmup_steps: linear warm-up.
        final_share: the rate falls linearly to this share of itself; 1 keeps it constant, as METHOD.md has it.
        max_grad_norm: gradients are clipped to this norm.
        save_every: steps between resumable states.
        seed: of batches, noise levels and noise.
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

    def __post_init__(self):
        for name in ("epochs", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "stitch_multiplier", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def rate(self, step: int, total: int) -> float:
        """The multiplier of both learning rates at a step."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * (1 - (1 - self.final_share) * step / total)


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


def _batch_indices(count: int, config: FinetuneConfig, step: int) -> Tensor:
    """The images of a step: a fresh permutation every epoch, the incomplete last batch dropped."""
    per_epoch = max(1, count // config.batch_size)
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng((config.seed, epoch)).permutation(count)
    return torch.from_numpy(order[position * config.batch_size : (position + 1) * config.batch_size])


def finetune(
    value: StitchedValue,
    teacher: RewardModel,
    targets: DistillationTargets,
    config: FinetuneConfig | None = None,
    *,
    state_path: str | Path | None = None,
    stop_at: int | None = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train stitch and suffix in place; backbone and teacher stay frozen.

    A state is saved to ``state_path`` every ``save_every`` steps and at the end; a call that finds one goes on from
    there and ends with the weights of an uninterrupted run, since every step's data follow from (seed, step).

    Args:
        stop_at: end after this many steps in all, with the state saved.
    Returns:
        every loss term's mean over each tenth of the run.
    Raises:
        FloatingPointError: a loss is not finite; names the step and the term.
        OSError: ``state_path`` holds the state of another run.
    """
    config = config or FinetuneConfig()
    if len(targets) < config.batch_size:
        raise ValueError(f"batch_size: expected at most the {len(targets)} images, got {config.batch_size}")
    device = value.backbone.device
    total = config.epochs * (len(targets) // config.batch_size)
    value.requires_grad_(True).train()
    frozen_head = list(value.suffix.head_parameters())
    for p in frozen_head:
        p.requires_grad_(False)
    stitch = list(value.stitch.parameters())
    suffix = [p for p in value.suffix.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": stitch, "lr": config.learning_rate * config.stitch_multiplier},
            {"params": suffix, "lr": config.learning_rate},
        ],
        weight_decay=0.0,
        fused=True,
    )
    base_rates = [group["lr"] for group in optimizer.param_groups]
    run = {
        **asdict(config),
        "depth": value.depth,
        "layer": value.layer,
        "targets": targets.digest,
        "backbone": hashlib.sha256(json.dumps(fingerprint(value.backbone, value.depth)).encode()).hexdigest(),
    }
    start, history = _load_state(state_path, value, optimizer, run)
    stop = min(total, stop_at or total)

    bar = tqdm(range(start, stop), initial=start, total=stop, desc="finetune", disable=not progress)
    for step in bar:
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((config.seed, step)).generate_state(1)[0]))
        clean, tokens, embeddings = targets.batch(_batch_indices(len(targets), config, step), device)
        sigma = centre_biased_sigmas(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        mix = expand_sigma(sigma.to(device), clean)
        with torch.no_grad():
            features = value.tokens((1 - mix) * clean + mix * noise, sigma.to(device))
        losses = distillation_loss(teacher, value(features), tokens, embeddings)
        for name, loss in losses.items():
            if not torch.isfinite(loss):
                raise FloatingPointError(f"finetune: the {name} loss is {loss.item()} at step {step}")
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * config.rate(step, total)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(stitch + suffix, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, loss in losses.items():
            history.setdefault(name, []).append(loss.item())
        if step % 10 == 0:
            bar.set_postfix({name: f"{loss.item():.4f}" for name, loss in losses.items()})
        if state_path and ((step + 1) % config.save_every == 0 or step + 1 == stop):
            _save_state(state_path, value, optimizer, run, step + 1, history)
    value.eval().requires_grad_(False)
    tenth = max(1, total // 10)
    return {name: [float(np.mean(v[k : k + tenth])) for k in range(0, len(v), tenth)] for name, v in history.items()}


def _save_state(path: str | Path, value: StitchedValue, optimizer, run: dict, step: int, history: dict) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(
        {
            "run": run,
            "value": value.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "history": history,
        },
        partial,
    )
    partial.replace(path)


def _load_state(
    path: str | Path | None, value: StitchedValue, optimizer, run: dict
) -> tuple[int, dict[str, list[float]]]:
    if path is None or not Path(path).is_file():
        return 0, {}
    state = torch.load(path, weights_only=True, map_location=value.backbone.device)
    other = [f"{n}: expected {run[n]}, got {state['run'].get(n)}" for n in run if run[n] != state["run"].get(n)]
    if other:
        raise OSError(f"state_path: {path} belongs to another run ({'; '.join(other)}); remove it to start anew")
    value.load_state_dict(state["value"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["history"]
