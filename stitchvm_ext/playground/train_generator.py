"""Stage 2 of the playground's training: the text-to-image transformer and its two text encoders.

Rectified flow (METHOD.md §1) on cached latents. Two things differ from a plain recipe, both because a model this small
has little time to learn where things go: noise levels lean towards high noise, where the layout is decided, and a
linear head on the fourth block's tokens predicts which colours and shapes cover each patch (the idea of REPA, arXiv
2410.06940, with the drawing's own labels instead of a pretrained encoder). The head is dropped after training.
A second, shorter phase restarts at a lower rate on the captions that stay hardest, several objects, and on the noise
levels at which it is decided how many there are.

The state is saved every ``SAVE_EVERY`` steps and a rerun goes on from there; batches depend on (seed, step, rank)
alone, so an interrupted run ends with the same weights. Run it under ``torchrun --nproc_per_node N`` for N processes.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import models, world
from .optim import Muon, step_seed

STEPS, HARD_STEPS = 7000, 1300  # of the two phases
BATCH = 64
DECAY_SHARE = 0.4  # the learning rate falls linearly over this last share of the first phase
HARD_RATE = 0.3  # where the second phase starts from, falling linearly to 0
NULL_TEXT_SHARE = 0.1
NOISE_MEAN, HARD_NOISE_MEAN, NOISE_STD = 0.6, 1.0, 1.3  # logit(sigma) ~ N(mean, std²), in the two phases
ALIGNED_BLOCK = 4
ALIGNMENT_WEIGHT = 0.5
SAVE_EVERY = 250

COVER_CHANNELS = len(world.COLORS) + len(world.SHAPES)


class Generator(nn.Module):
    """The transformer with its text encoders and the training-only alignment head."""

    def __init__(self):
        super().__init__()
        self.transformer = models.build_transformer()
        self.text_encoder = models.build_text_encoder()
        self.text_encoder_2 = models.build_text_encoder()
        self.cover_head = nn.Linear(self.transformer.inner_dim, COVER_CHANNELS)
        for name, p in self.transformer.named_parameters():
            if ("norm1" in name or "norm_out" in name) and "linear" in name or name.startswith("proj_out"):
                nn.init.zeros_(p)
        self._tokens: Tensor | None = None
        block = self.transformer.transformer_blocks[ALIGNED_BLOCK - 1]
        block.register_forward_hook(self._keep_tokens)

    def _keep_tokens(self, module, args, output):
        self._tokens = output[1]

    def forward(self, latents: Tensor, sigma: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity [B, 4, 16, 16] and cover logits [B, 64, 11] of noisy latents."""
        texts = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        velocity = self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=torch.cat([t.hidden_states[-2] for t in texts], -1),  # as the pipeline reads them
            pooled_projections=torch.cat([t.text_embeds for t in texts], -1),
        ).sample
        tokens, self._tokens = self._tokens, None
        return velocity, self.cover_head(tokens)


def patch_cover(objects: list[world.Shape], patch: int = 8) -> np.ndarray:
    """Share of every 8x8 patch that each colour and each shape covers: float16 [64, 11]."""
    grid = world.SIZE // patch
    cover = np.zeros((grid, grid, COVER_CHANNELS), np.float16)
    for o in objects:
        inside = np.clip(0.5 - world.signed_distance(o.shape, o.x, o.y, o.radius), 0, 1)
        share = inside.reshape(grid, patch, grid, patch).mean((1, 3))
        cover[..., world.COLOR_NAMES.index(o.color)] += share
        cover[..., len(world.COLORS) + world.SHAPES.index(o.shape)] += share
    return cover.reshape(grid * grid, COVER_CHANNELS).clip(0, 1)


def _noise_levels(count: int, mean: float, generator: torch.Generator) -> Tensor:
    """Logit-normal sigmas [B], one from each of ``count`` equal slices of probability."""
    uniform = ((torch.arange(count) + torch.rand(count, generator=generator)) / count).clamp(1e-4, 1 - 1e-4)
    return torch.sigmoid(torch.special.ndtri(uniform) * NOISE_STD + mean)


def _learning_rate(step: int, steps: int, hard_steps: int) -> float:
    if step >= steps:
        return HARD_RATE * (1 - (step - steps) / hard_steps)
    return min(1.0, (step + 1) / 50) * min(1.0, (1 - step / steps) / DECAY_SHARE + 0.005)


def _hard_pictures(captions: list[str]) -> list[Tensor]:
    """Positions of the captions that count equal objects, and of those that join two different ones."""
    counted = torch.tensor([k for k, c in enumerate(captions) if c.startswith(("two", "three"))])
    return [counted, torch.tensor([k for k, c in enumerate(captions) if " and " in c])]


def train_generator(
    latents: Tensor,
    captions: list[str],
    covers: Tensor,
    state_path: Path,
    steps: int = STEPS,
    hard_steps: int = HARD_STEPS,
    seed: int = 0,
    stop_at: int | None = None,
) -> Generator:
    """Train on scaled latents [N, 4, 16, 16] with captions and patch covers [N, 64, 11]; returns the running average.

    ``stop_at`` ends early, after that many steps, with the state saved.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    torch.manual_seed(seed)
    model = Generator().to(accelerator.device)
    average = copy.deepcopy(model).eval()
    optimizer = Muon(
        model, lr=4e-3, lr_adam=2e-3, weight_decay=0.01,
        adam_names=("embed", "proj_out", "norm", "cover_head"), compute_dtype=torch.bfloat16,
    )  # fmt: skip
    start = 0
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True, map_location=accelerator.device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    wrapped = accelerator.prepare(model)
    tokenizer = models.build_tokenizer()
    ids, null_ids = models.tokenize(tokenizer, captions), models.tokenize(tokenizer, [""])[0]
    batch = BATCH // accelerator.num_processes
    counted, pairs = _hard_pictures(captions)
    stop = min(steps + hard_steps, stop_at or steps + hard_steps)

    progress = tqdm(
        range(start, stop), initial=start, total=stop, desc="generator", mininterval=10,
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    for step in progress:
        rng = torch.Generator().manual_seed(step_seed(seed, step, accelerator.process_index))
        pick = torch.randint(len(latents), (batch,), generator=rng)
        if step >= steps:  # half of the batch counts, a quarter joins
            half, quarter = batch // 2, batch // 4
            pick[:half] = counted[torch.randint(len(counted), (half,), generator=rng)]
            pick[half : half + quarter] = pairs[torch.randint(len(pairs), (quarter,), generator=rng)]
        clean, text = latents[pick], ids[pick].clone()
        text[torch.rand(batch, generator=rng) < NULL_TEXT_SHARE] = null_ids
        sigma = _noise_levels(batch, NOISE_MEAN if step < steps else HARD_NOISE_MEAN, rng)
        noise = torch.randn(clean.shape, generator=rng)
        mix = sigma.view(-1, 1, 1, 1)
        noisy = (1 - mix) * clean + mix * noise
        to = accelerator.device
        velocity, cover = wrapped(noisy.to(to), sigma.to(to), text.to(to))
        flow_loss = F.mse_loss(velocity, (noise - clean).to(to))
        loss = flow_loss + ALIGNMENT_WEIGHT * F.binary_cross_entropy_with_logits(cover, covers[pick].float().to(to))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(_learning_rate(step, steps, hard_steps))
        with torch.no_grad():
            decay = min(0.998, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if step % 50 == 0:
            if not torch.isfinite(loss):
                raise FloatingPointError(f"generator: the loss is {loss.item()} at step {step}")
            progress.set_postfix(
                flow=f"{flow_loss.item():.4f}", cover=f"{(loss - flow_loss).item() / ALIGNMENT_WEIGHT:.4f}"
            )
        if accelerator.is_main_process and ((step + 1) % SAVE_EVERY == 0 or step + 1 == stop):
            partial = state_path.with_suffix(".partial")
            torch.save(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
                partial,
            )
            partial.replace(state_path)
    return average
