"""How many images per second does stage 2 train on, with latents and targets cached and without?

One optimiser step: features of the frozen prefix at fresh noise, stitch and suffix forward and backward, AdamW in
float32 (under bfloat16 autocast where the backbone is bfloat16). Without caches every batch is encoded and read by the
teacher besides, which is what filling the caches costs once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..backbones import expand_rows, expand_sigma
from ..value.distillation import centre_biased_sigmas, distillation_loss
from ..value.finetune import FinetuneConfig, prefix_tokens, prepare_training
from ..value.targets import teacher_output
from .scales import Setup, build
from .suite import Calls, Rows, measure

BATCH = {"playground": 64, "quarter": 4, "real": 4}
FILL, CACHED, UNCACHED = "fill the caches", "step, cached", "step, not cached"


def run(scale: str, name: str, *, out: Path, device: str, pixels: int | None, rounds: int) -> dict[str, Any]:
    """Measure all variants in turns."""
    setup, batch = build(scale, device, pixels), BATCH[scale]
    setup.description["batch"] = batch

    def rates(rows: Rows) -> dict[str, Any]:
        return {"images_per_second": {v: 1e3 * batch / rows[v]["median_ms"] for v in (FILL, CACHED, UNCACHED)}}

    result = measure(setup, calls(setup), name, out=out, rounds=rounds, add=rates)
    print(", ".join(f"{variant}: {rate:.3g} images/s" for variant, rate in result["images_per_second"].items()))
    return result


def calls(setup: Setup) -> Calls:
    """Batches of stage 2, by name; they train the setup's value."""
    value, backbone, reward = setup.value, setup.backbone, setup.reward
    batch, pixels = BATCH[setup.description["scale"]], setup.description["pixels"]
    generator = torch.Generator().manual_seed(6)
    images = torch.rand(batch, 3, pixels, pixels, generator=generator)
    config, low = FinetuneConfig(), backbone.dtype == torch.bfloat16
    stitch, suffix = prepare_training(value)
    groups = [{"params": stitch, "lr": config.learning_rate * config.stitch_multiplier}, {"params": suffix}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0, fused=True)
    null = expand_rows(value.null_condition, batch)

    @torch.no_grad()
    def fill() -> tuple:
        targets = teacher_output(reward, images)
        return backbone.encode_images(setup.pipe.vae, images.to(backbone.device)), targets

    def step(read: Callable[[], tuple]) -> Callable[[], None]:
        def train() -> None:
            clean, targets = read()
            sigma = centre_biased_sigmas(batch, generator).to(clean.device)
            mix = expand_sigma(sigma, clean)
            noisy = (1 - mix) * clean + mix * torch.randn(clean.shape, generator=generator).to(clean.device)
            with torch.no_grad():
                (tokens,) = prefix_tokens([value], noisy, sigma, null)
            with torch.autocast(clean.device.type, torch.bfloat16, enabled=low):
                output = value(tokens)
            wanted = (targets[k].to(clean.device).float() for k in ("tokens", "embeddings"))
            sum(distillation_loss(reward, output, *wanted).values()).backward()
            torch.nn.utils.clip_grad_norm_(stitch + suffix, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return train

    cached = fill()
    return {FILL: fill, CACHED: step(lambda: cached), UNCACHED: step(fill)}
