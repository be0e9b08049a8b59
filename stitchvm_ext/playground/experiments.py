"""Measurements on the playground that the demo and the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones import Condition, expand_rows
from ..backbones.latents import encode_images
from ..evaluation.compare import Contender, compare
from ..evaluation.metrics import number_captions, retrieval_at_1, spearman, variance_explained
from ..evaluation.noise_levels import SIGMAS, add_noise, read_output, scorer_of
from ..value import StitchedValue, TweedieValue
from . import world
from .evaluate import held_out_captions


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
class MethodResult:
    """What a method produced on all prompts: images [N, 3, H, W] in [0, 1] and a row of figures."""

    images: Tensor
    figures: dict[str, float]


def compare_methods(
    pipe,
    methods: Sequence[Contender],
    prompts: Sequence[str],
    rewards: dict[str, torch.nn.Module],
    *,
    chunk: int = 12,
    seed: int = 0,
    on_chunk: Callable[[], None] | None = None,
    **common,
) -> dict[str, MethodResult]:
    """:func:`~stitchvm_ext.evaluation.compare.compare` with the exact checker; one flat row of figures per method."""
    found = compare(
        pipe, methods, prompts, rewards, prompts_per_batch=chunk, seed=seed * 100_003, measures=checker_measures,
        on_batch=on_chunk, progress=False, **common,
    )  # fmt: skip
    return {
        name: MethodResult(
            found.images[name].float() / 255,
            row["means"] | {key: float(row[key]) for key in ("seconds_per_image", "peak_bytes")},
        )
        for name, row in found.figures.items()
    }


def checker_measures(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Whether the exact checker finds the objects, colours and count that a prompt asks for, 0 or 1 per image."""
    pixels = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    checks = [world.check(image, prompt) for image, prompt in zip(pixels, prompts, strict=True)]
    return {name: torch.tensor([float(getattr(c, name)) for c in checks]) for name in ("objects", "colors", "count")}


def held_out_prompts(count: int) -> list[str]:
    """The first ``count`` distinct held-out captions."""
    prompts: list[str] = []
    draws = count
    while len(prompts) < count:
        draws *= 2
        prompts = list(dict.fromkeys(held_out_captions(draws)))
    return prompts[:count]
