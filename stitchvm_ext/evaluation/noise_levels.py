"""How well does a value estimator read noisy latents of pictures that people have captioned, ranked or rated?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from ..backbones import Condition, Encoding, backbone_of, expand_rows
from ..data import ImageFiles
from ..rewards.base import RewardModel, RewardOutput
from ..rewards.sum import RewardSum
from ..value import StitchedValue, TweedieValue, ValueEstimator, ValueSum
from .formats import EvaluationSet
from .metrics import spearman
from .report import SPEARMAN, NoiseLevelReport

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)  # METHOD.md's


def add_noise(latents: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t eps (METHOD.md §1)."""
    return (1 - sigma) * latents + sigma * noise


def noise_for(latents: Tensor, first: int, seed: int) -> Tensor:
    """The noise of pictures ``first``, ``first + 1``, ...: each picture's own, whatever the batches."""
    rows = [
        torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed * 1_000_003 + first + k))
        for k in range(len(latents))
    ]
    return torch.stack(rows).to(latents)


def scorer_of(estimator: StitchedValue | TweedieValue) -> RewardModel | RewardSum:
    """What turns the estimator's image embeddings into scores."""
    return estimator.suffix if isinstance(estimator, StitchedValue) else estimator.reward


def read_output(
    estimator: StitchedValue | TweedieValue, latents: Tensor, sigma: float, null_condition: Encoding
) -> RewardOutput:
    """Tokens and image embedding that an estimator sees in latents [B, C, H, W], under the null text (one row)."""
    if isinstance(estimator, StitchedValue):
        return estimator.output(latents, sigma)
    level = estimator.backbone.check_latents(latents, sigma)
    velocity = estimator.backbone.velocity(latents, level, expand_rows(null_condition, len(latents)))
    return estimator.reward.output(estimator.denoised_images(latents, level, velocity))


@torch.no_grad()
def evaluate_noise_levels(
    pipe,
    estimators: Mapping[str, ValueEstimator],
    data: EvaluationSet,
    *,
    reward: RewardModel | None = None,
    size: tuple[int, int] | None = None,
    sigmas: Sequence[float] = SIGMAS,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> NoiseLevelReport:
    """Encode pictures, noise them, and compare what estimators make of them with people and with the clean reward.

    Pictures are read from disk batch by batch. All estimators see the same latents with the same noise, which is a
    picture's own at all levels. No text guides a denoiser (the null text, no classifier-free guidance); a
    prompt-conditioned value reads the picture's prompt, except for retrieval.

    Args:
        pipe: the pipeline whose autoencoder encodes; with a text encoder.
        estimators: on this pipeline's latents, by name. Retrieval takes StitchedValue and TweedieValue with text
            embeddings (CLIP-like rewards).
        data: see :func:`read_evaluation_set`.
        reward: the clean reward, to compare with; it sees the same crop of each picture.
        size: (H, W) of the pictures in pixels; by default what the first stitched value was made for, else the
            pipeline's.
        sigmas: noise levels in (0, 1).

    Raises:
        TypeError, ValueError: an argument does not fit, before any work. OSError: a picture cannot be read.
    """
    if not estimators:
        raise ValueError("estimators: expected at least one, got none")
    if len(data) < 2:
        raise ValueError(f"data: expected at least 2 pictures, got {len(data)}")
    if not sigmas or not all(0 < s < 1 for s in sigmas):
        raise ValueError(f"sigmas: expected noise levels between 0 and 1, got {list(sigmas)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    backbone = backbone_of(pipe)
    size, latent_size = _sizes(pipe, backbone, estimators, size)
    for name, estimator in estimators.items():
        if hasattr(estimator, "check_latent_size"):
            estimator.check_latent_size(latent_size)
        _check_reader(name, estimator, data)
    if reward is not None:
        reward.check_whole()
        _check_scorer("reward", reward, data)
    default_null = backbone.null_condition(pipe)
    readers = {name: _Reader(pipe, estimator, default_null, data) for name, estimator in estimators.items()}
    clean = _Found()
    found = {(name, sigma): _Found() for name in readers for sigma in sigmas}

    source = ImageFiles(data.images).resized(size)
    records = source.records()
    for first in tqdm(range(0, len(data), batch_size), desc=f"noise levels ({data.name})", disable=not progress):
        part = slice(first, first + batch_size)
        images = source.load(list(islice(records, batch_size)))
        prompts = tuple(data.prompts[part]) if data.prompts else ("",) * len(images)
        latents = backbone.encode_images(pipe.vae, images.to(pipe.vae.device)).to(backbone.device)
        noise = noise_for(latents, first, seed)
        if reward is not None:
            output = reward.output(images.to(reward.device), pooled_only=True)
            clean.add(reward.score(output, reward.encode_condition(prompts)), output if data.by_embedding else None)
        for sigma in sigmas:
            noisy = add_noise(latents, sigma, noise)
            for name, reader in readers.items():
                found[name, sigma].add(*reader(noisy, sigma, prompts))

    truth = None if reward is None else clean.scores
    curves = {}
    for name, reader in readers.items():
        curves[name] = []
        for sigma in sigmas:
            here = found[name, sigma]
            row = {"sigma": float(sigma), data.metric: data.measure(here.scores, here.embeddings, reader.texts)}
            if truth is not None:
                row[SPEARMAN] = spearman(here.scores, truth)
            curves[name].append(row)
    own = None if reward is None else data.measure(clean.scores, clean.embeddings, _texts(reward, data))
    return NoiseLevelReport(data.name, len(data), size, data.metric, own, curves)


class _Found:
    """Scores [N] and, for retrieval, embeddings [N, D], batch by batch; on the CPU."""

    def __init__(self):
        self._scores: list[Tensor] = []
        self._embeddings: list[Tensor] = []

    def add(self, scores: Tensor, output: RewardOutput | None) -> None:
        self._scores.append(scores.float().cpu())
        if output is not None:
            self._embeddings.append(output.normalized.cpu())

    @property
    def scores(self) -> Tensor:
        return torch.cat(self._scores)

    @property
    def embeddings(self) -> Tensor | None:
        return torch.cat(self._embeddings) if self._embeddings else None


class _Reader:
    """Scores, and for retrieval outputs, of noisy latents by one estimator."""

    def __init__(self, pipe, estimator: ValueEstimator, default_null: Encoding, data: EvaluationSet):
        self.pipe, self.estimator, self.by_embedding = pipe, estimator, data.by_embedding
        self.null = getattr(estimator, "null_condition", default_null)
        self.texts = _texts(scorer_of(estimator), data) if data.by_embedding else None

    def __call__(self, latents: Tensor, sigma: float, prompts: tuple[str, ...]) -> tuple[Tensor, RewardOutput | None]:
        if self.by_embedding:
            scorer = scorer_of(self.estimator)
            output = read_output(self.estimator, latents, sigma, self.null)
            return scorer.score(output, scorer.encode_condition(prompts)), output
        if getattr(self.estimator, "prompt_conditioned", False):
            encoding = self.estimator.backbone.encode_text(self.pipe, list(prompts), **self.estimator.text_options)
        else:
            encoding = expand_rows(self.null, len(prompts))
        return self.estimator.value(latents, sigma, Condition(prompts, encoding)), None


def _texts(scorer: RewardModel, data: EvaluationSet, batch_size: int = 256) -> Tensor | None:
    """Text embeddings [M, D] of a retrieval set's distinct captions; None for other sets."""
    if not data.by_embedding:
        return None
    texts = data.texts
    parts = [scorer.encode_condition(texts[k : k + batch_size]) for k in range(0, len(texts), batch_size)]
    return torch.cat(parts).float().cpu()


def _sizes(pipe, backbone, estimators, size) -> tuple[tuple[int, int], tuple[int, int]]:
    """(H, W) in pixels and in latent positions."""
    factor = backbone.pixel_factor(pipe)
    if size is None:
        made_for = [e.latent_size for e in estimators.values() if isinstance(e, StitchedValue)]
        latent_size = made_for[0] if made_for else backbone.latent_size(pipe)
    else:
        latent_size = backbone.latent_size(pipe, *size)
    return tuple(side * factor for side in latent_size), tuple(latent_size)


def _check_reader(name: str, estimator: ValueEstimator, data: EvaluationSet) -> None:
    if not isinstance(estimator, ValueEstimator):
        raise TypeError(f"estimators[{name!r}]: expected a ValueEstimator, got {type(estimator).__name__}")
    if data.by_embedding and not isinstance(estimator, StitchedValue | TweedieValue):
        raise TypeError(
            f"estimators[{name!r}]: {data.name} asks for image embeddings, of a StitchedValue or TweedieValue, "
            f"got {type(estimator).__name__}"
        )
    for part in estimator.values if isinstance(estimator, ValueSum) else [estimator]:
        scorer = scorer_of(part) if isinstance(part, StitchedValue) else getattr(part, "reward", None)
        if scorer is not None:
            _check_scorer(f"estimators[{name!r}]", scorer, data)


def _check_scorer(name: str, scorer: RewardModel | RewardSum, data: EvaluationSet) -> None:
    """Whether the data have what the reward reads, and the reward what the data ask for."""
    condition = scorer.encode_condition(["a photo"])
    if data.by_embedding and not (isinstance(condition, Tensor) and condition.ndim == 2):
        raise ValueError(
            f"{name}: {data.name} asks for text embeddings, of a CLIP-like reward, got {type(scorer).__name__}"
        )
    if data.prompts is None and any(c is not None for c in (condition if isinstance(condition, list) else [condition])):
        raise ValueError(f"{name}: {type(scorer).__name__} scores for prompts, and {data.name} has none")
