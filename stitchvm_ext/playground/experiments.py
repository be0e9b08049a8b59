"""Measurements on the playground that the demo and the benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backbones import Condition, expand_rows
from ..backbones.latents import encode_images
from ..evaluation.metrics import number_captions, retrieval_at_1, spearman, variance_explained
from ..evaluation.noise_levels import SIGMAS, add_noise, read_output, scorer_of
from ..measure import peak_memory
from ..value import StitchedValue, TweedieValue, ValueEstimator
from . import world
from .evaluate import checker_accuracy, held_out_captions


def picture_tensor(pictures: Sequence[world.Picture]) -> Tensor:
    """uint8 [N, 3, 64, 64] of pictures."""
    import numpy as np

    return torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2).contiguous()


@dataclass
class HeldOut:
    """Held-out pictures with everything the noise-level measurements need, computed once."""

    latents: Tensor  # [N, 4, 16, 16]
    embeddings: Tensor  # clean image embeddings, normalised [N, D]
    texts: Tensor  # embeddings of the M distinct captions [M, D]
    own_texts: list[set[int]]  # the position of each picture's caption among them
    pairs: Condition  # every second caption swapped for another picture's, for a reward that varies
    clean_reward: Tensor  # of those pairs [N]


def held_out(pipe, reward, count: int, seed: int = 2) -> HeldOut:
    """``count`` held-out pictures with captions; every second prompt in ``pairs`` belongs to another picture."""
    pictures = world.dataset(count, seed, held_out=True)
    captions = [p.caption for p in pictures]
    images = picture_tensor(pictures).float() / 255
    with torch.no_grad():
        latents = torch.cat([encode_images(pipe.vae, x) for x in images.split(64)])
        embeddings = torch.cat([reward.output(x).normalized for x in images.split(64)])
        distinct, own_texts = number_captions([[caption] for caption in captions])
        texts = reward.encode_condition(distinct)
    prompts = [captions[k] if k % 2 else captions[(k + count // 2) % count] for k in range(count)]
    null = expand_rows(_null(pipe), count)
    pairs = Condition(prompts=tuple(prompts), cond=null)
    clean = (embeddings * reward.encode_condition(prompts)).sum(-1)
    return HeldOut(latents, embeddings, texts, own_texts, pairs, clean)


def _null(pipe):
    from ..backbones import backbone_of

    return backbone_of(pipe).null_condition(pipe, max_sequence_length=0)


def noisy_latents(latents: Tensor, sigma: float, seed: int = 3) -> Tensor:
    """Latents at a noise level, with the same noise for whoever is measured."""
    return add_noise(latents, sigma, torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def noise_level_accuracy(
    estimator: StitchedValue | TweedieValue, data: HeldOut, head=None, sigmas=SIGMAS
) -> list[dict[str, float]]:
    """How well an estimator reads noisy held-out latents, one row per sigma.

    ``spearman``: of its value with the clean reward over (picture, prompt) pairs; ``r_at_1``: image-to-text retrieval
    by its embedding; ``cosine``: of its embedding with the clean one; with an aesthetic ``head`` also that score's R²
    and Spearman. Tweedie denoises under the null text, as the stitched value reads the latent.
    """
    null = {name: t[:1] for name, t in data.pairs.cond.items()}
    rows = []
    for sigma in sigmas:
        z = noisy_latents(data.latents, sigma)
        parts = [read_output(estimator, part, sigma, null).normalized for part in z.split(64)]
        embedding = torch.cat(parts)
        value = (embedding * scorer_of(estimator).encode_condition(data.pairs.prompts)).sum(-1)
        row = {
            "sigma": sigma,
            "spearman": spearman(value, data.clean_reward),
            "r_at_1": retrieval_at_1(embedding, data.texts, data.own_texts),
            "cosine": (embedding * data.embeddings).sum(-1).mean().item(),
        }
        if head is not None:
            estimate, truth = head(embedding), head(data.embeddings)
            row |= {
                "aesthetic_r2": variance_explained(estimate, truth),
                "aesthetic_spearman": spearman(estimate, truth),
            }
        rows.append(row)
    return rows


@dataclass
class Method:
    """One way of sampling to compare: a name, an estimator (None for unguided) and guided_sample's options."""

    name: str
    value: ValueEstimator | None
    options: dict = field(default_factory=dict)


@dataclass
class MethodResult:
    """What a method produced on all prompts: images [N, 3, H, W] in [0, 1] and a row of figures."""

    images: Tensor
    figures: dict[str, float]


def compare_methods(
    pipe,
    methods: Sequence[Method],
    prompts: Sequence[str],
    rewards: dict[str, torch.nn.Module],
    *,
    chunk: int = 12,
    seed: int = 0,
    on_chunk: Callable[[], None] | None = None,
    **common,
) -> dict[str, MethodResult]:
    """The same prompts and seeds through several methods, alternating chunk by chunk.

    Figures per method: the mean of every reward, the checker's accuracies, median seconds per image over the chunks,
    and peak extra memory in bytes.
    """
    from ..sampling import guided_sample

    images: dict[str, list[Tensor]] = {m.name: [] for m in methods}
    seconds: dict[str, list[float]] = {m.name: [] for m in methods}
    memory = dict.fromkeys(images, 0)
    for start in range(0, len(prompts), chunk):
        part = list(prompts[start : start + chunk])
        for method in methods:
            generators = [torch.Generator().manual_seed(seed * 100_003 + start + k) for k in range(len(part))]
            with peak_memory(pipe.device) as peak:
                began = time.perf_counter()
                result = guided_sample(
                    pipe,
                    method.value,
                    part,
                    generator=generators,
                    output_type="pt",
                    progress=False,
                    **common,
                    **method.options,
                )
                seconds[method.name].append((time.perf_counter() - began) / len(part))
            memory[method.name] = max(memory[method.name], peak.bytes)
            images[method.name].append(result.images.cpu())
            if on_chunk:
                on_chunk()
    return {
        m.name: MethodResult(
            pictures := torch.cat(images[m.name]).clamp(0, 1),
            score_images(pictures, prompts, rewards)
            | {"seconds_per_image": statistics.median(seconds[m.name]), "peak_bytes": float(memory[m.name])},
        )
        for m in methods
    }


@torch.no_grad()
def score_images(images: Tensor, prompts: Sequence[str], rewards: dict[str, torch.nn.Module]) -> dict[str, float]:
    """Mean of every reward, and the checker's accuracies, on images [N, 3, 64, 64] in [0, 1]."""
    figures = {}
    for name, reward in rewards.items():
        parts = [reward(x, list(prompts[64 * k : 64 * k + len(x)])) for k, x in enumerate(images.split(64))]
        figures[name] = torch.cat(parts).mean().item()
    pixels = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    accuracy = checker_accuracy(pixels, list(prompts))["all"]
    return figures | {name: accuracy[name] for name in ("objects", "colors", "count")}


def held_out_prompts(count: int) -> list[str]:
    """The first ``count`` distinct held-out captions."""
    prompts: list[str] = []
    draws = count
    while len(prompts) < count:
        draws *= 2
        prompts = list(dict.fromkeys(held_out_captions(draws)))
    return prompts[:count]
