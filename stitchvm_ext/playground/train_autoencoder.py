"""Stage 1 of the playground's training: the autoencoder. Nothing downstream is sharper than it."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from ..precision import fast_dtype
from . import models, world
from .optim import Muon

STEPS = 3000
CROP_SHARE = 0.5  # the first half of training sees twice as many half-size crops
BATCH = 16


def to_unit(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1], channels last."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def _gradient_l1(error: Tensor) -> Tensor:
    return (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()


def _edge_weight(x: Tensor) -> Tensor:
    """1 on flat ground and 4 near edges: where a 2x2 window spans more than 0.25, widened by one pixel."""
    span = (F.max_pool2d(x, 2, 1) + F.max_pool2d(-x, 2, 1)).amax(1, keepdim=True)
    return 1 + 3 * (F.max_pool2d(F.pad(span, (0, 1, 0, 1)), 3, 1, 1) > 0.25)


def reconstruction_loss(error: Tensor, target: Tensor) -> Tensor:
    """Edge-weighted L1 and the L1 of image gradients at two scales."""
    return (
        (_edge_weight(target) * error.abs()).mean()
        + 0.5 * _gradient_l1(error)
        + 0.5 * _gradient_l1(F.avg_pool2d(error, 2))
    )


def _random_crops(x: Tensor, size: int) -> Tensor:
    starts = torch.randint(0, x.shape[-1] - size + 1, (len(x), 2)).tolist()
    return torch.stack([image[:, a : a + size, b : b + size] for image, (a, b) in zip(x, starts, strict=True)])


def train_autoencoder(images: Tensor, steps: int = STEPS, seed: int = 0, device: str = "cpu"):
    """Train the AutoencoderKL on images, uint8 [N, 64, 64, 3]; returns its running average, in eval mode."""
    torch.manual_seed(seed)
    model = models.build_autoencoder().to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).eval()
    optimizer = Muon(model, lr=4e-3, lr_adam=2e-3, weight_decay=1e-3, adam_names=("conv_in", "conv_out"))
    progress = trange(steps, desc="autoencoder", mininterval=10)
    for step in progress:
        done = step / steps
        cropping = done < CROP_SHARE
        x = to_unit(images[torch.randint(len(images), (2 * BATCH if cropping else BATCH,))])
        x = (
            (_random_crops(x, x.shape[-1] // 2) if cropping else x)
            .to(device)
            .contiguous(memory_format=torch.channels_last)
        )
        with torch.autocast(device, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16):
            posterior = model.encode(x).latent_dist
            y = model.decode(posterior.sample()).sample
        error = y.float() - x
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(error, x) + (5e-4 if done < 0.25 else 2e-3) * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(min(1, (step + 1) / 30) * (0.5 + 0.49 * math.cos(math.pi * done)))
        with torch.no_grad():
            decay = min(0.99, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if step % 100 == 0:
            if not torch.isfinite(loss):
                raise FloatingPointError(f"autoencoder: the loss is {loss.item()} at step {step}")
            progress.set_postfix(l1=f"{error.abs().mean().item():.4f}", kl=f"{kl.item():.2f}")
    return average.to("cpu", memory_format=torch.contiguous_format)


@torch.no_grad()
def encode_images(autoencoder, images: Tensor, batch_size: int = 100) -> Tensor:
    """Raw latents [N, 4, 16, 16] (posterior means, before shift and scale) of images uint8 [N, 64, 64, 3]."""
    batches = images.split(batch_size)
    return torch.cat(
        [
            autoencoder.encode(to_unit(b).contiguous(memory_format=torch.channels_last)).latent_dist.mode()
            for b in batches
        ]
    )


@torch.no_grad()
def decode_latents(autoencoder, latents: Tensor, batch_size: int = 100) -> Tensor:
    """Images uint8 [N, 64, 64, 3] of raw latents."""
    decoded = torch.cat([autoencoder.decode(z).sample for z in latents.split(batch_size)]).clamp(-1, 1)
    return ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous()


def reconstruction_quality(autoencoder, pictures) -> dict[str, float]:
    """PSNR in dB and the checker's accuracy on reconstructions."""
    images = torch.from_numpy(np.stack([p.image for p in pictures]))
    decoded = decode_latents(autoencoder, encode_images(autoencoder, images))
    mse = ((decoded.float() - images.float()) / 255).square().mean((1, 2, 3))
    correct = [world.check(image.numpy(), p.caption).objects for image, p in zip(decoded, pictures, strict=True)]
    return {"psnr": -10 * mse.log10().mean().item(), "objects": sum(correct) / len(correct)}
