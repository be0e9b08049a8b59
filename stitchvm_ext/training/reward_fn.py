"""Any estimator, or any clean reward, as the reward function of a training loop that is not ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..backbones import Condition
from ..data.memory import as_image_tensor
from ..rewards.base import RewardModel
from ..rewards.sum import RewardSum
from ..sampling.checks import as_prompts
from ..sampling.encoding import encode_condition, text_options_of
from ..value.base import ValueEstimator, score_images
from .rewards import CleanReward


class RewardFunction:
    """``(images or latents, prompts, metadata) -> scores``, see :func:`as_reward_fn`."""

    def __init__(self, scorer, pipe, sigma: float | None, max_sequence_length: int | None, batch_size: int):
        self.pipe, self.sigma, self.batch_size = pipe, sigma, batch_size
        if isinstance(scorer, ValueEstimator):
            self.value = scorer
        else:
            self.value = None if pipe is None else CleanReward(pipe, scorer)
        # What reads images as they are; every other estimator reads latents.
        self.reward = scorer.reward if isinstance(scorer, CleanReward) else scorer
        self.reads_images = not isinstance(self.reward, ValueEstimator)
        self.text_options: dict[str, Any] = {}
        if self.value is not None:
            self.text_options = text_options_of(self.value.backbone, self.value, max_sequence_length)

    def __call__(
        self,
        samples: Tensor | Sequence[Any],
        prompts: str | Sequence[str],
        metadata: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        sigma: float | Sequence[float] | Tensor | None = None,
    ) -> Tensor:
        """Scores, float32 [B] on the model's device; differentiable where ``samples`` is a tensor with a gradient.

        Args:
            samples: B images or latents, as :func:`as_reward_fn` says.
            prompts: B texts, or one for all.
            metadata: of the samples: a mapping, or one entry per sample (a mapping, JSON text of one, or anything
                else, which says nothing). "sigma" in it is the noise level.
            sigma: noise level of latents, one or B; comes before that in ``metadata``.

        Raises:
            TypeError, ValueError: samples that are neither, another number of prompts, latents for a clean reward
                that are not clean or for which there is no pipeline.
        """
        level = self._level(sigma, metadata, len(samples))
        texts = as_prompts("prompts", prompts if isinstance(prompts, str) else list(prompts))
        texts = texts * len(samples) if isinstance(prompts, str) else texts
        if len(texts) != len(samples):
            raise ValueError(f"prompts: expected {len(samples)}, one per sample, got {len(texts)}")
        samples = self._images(samples) if level is None else self._latents(samples)
        scores = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            with nullcontext() if samples.requires_grad else torch.no_grad():
                scores.append(self._score(samples[part], texts[part], None if level is None else level[part]))
        return torch.cat(scores)

    def _score(self, samples: Tensor, prompts: list[str], level: Tensor | None) -> Tensor:
        if level is None and self.reads_images:
            return score_images(self.reward, samples.to(self.reward.device), tuple(prompts)).float()
        backbone = self.value.backbone
        samples = samples.to(backbone.device)
        if level is None:
            samples, level = backbone.encode_images(self.pipe.vae, samples), torch.zeros(len(prompts))
        if self.value.reads_encoding:
            condition = encode_condition(self.pipe, backbone, prompts, [""] * len(prompts), 1.0, self.text_options)
        else:
            condition = Condition(tuple(prompts), {})
        return self.value.value(samples, level.to(samples.device), condition).float()

    # -- input ---------------------------------------------------------------------------------------------------------

    def _level(self, sigma, metadata, count: int) -> Tensor | None:
        """[B] in [0, 1], or None for images."""
        if sigma is None:
            sigma = _sigma_in(metadata, count)
        if sigma is None:
            sigma = self.sigma
        if sigma is None:
            return None
        level = torch.as_tensor(sigma, dtype=torch.float32)
        if level.ndim > 1 or (level.ndim == 1 and len(level) != count):
            raise ValueError(f"sigma: expected one number or {count}, got shape {list(level.shape)}")
        if not bool(((level >= 0) & (level <= 1)).all()):
            raise ValueError(f"sigma: expected numbers in [0, 1], got {level.min():g}..{level.max():g}")
        return level.expand(count)

    def _images(self, images) -> Tensor:
        if not self.reads_images and self.pipe is None:
            raise ValueError("pipe: expected a pipeline, whose autoencoder reads images for an estimator, got None")
        if not isinstance(images, Tensor) and all(isinstance(image, Tensor) for image in images):
            images = torch.stack(list(images))
        images = as_image_tensor(images)
        if images.requires_grad and not self.reads_images:
            raise ValueError("samples: expected images without a gradient, which only a clean reward passes on")
        return images.float() if images.is_floating_point() else images.float() / 255

    def _latents(self, latents) -> Tensor:
        if self.value is None:
            raise ValueError("pipe: expected a pipeline, whose autoencoder decodes latents for a reward, got None")
        if not isinstance(latents, Tensor):
            if not all(isinstance(latent, Tensor) for latent in latents):
                raise TypeError("samples: with a noise level expected latents, a tensor [B, C, H, W], got others")
            latents = torch.stack(list(latents))
        return latents.float()


def as_reward_fn(
    scorer: ValueEstimator | RewardModel | RewardSum,
    pipe=None,
    *,
    sigma: float | None = None,
    max_sequence_length: int | None = None,
    batch_size: int = 16,
) -> RewardFunction:
    """Any estimator or clean reward as ``(images or latents, prompts, metadata) -> scores``, in this process.

    Samples without a noise level are images: PIL images of one size, or a tensor (or a list of tensors) [B, 3, H, W],
    uint8 or float in [0, 1]. A clean reward scores them as they are; another estimator reads their latents at noise
    level 0. Samples with one are latents [B, C, H, W] of the pipeline's space: an estimator reads them as they are; a
    clean reward decodes them, and takes 0 alone. The level comes with the call, in its metadata, or from here.

    See docs/rl_engines.md for the engines that call such a function.

    Args:
        scorer: what scores: a StitchedValue, a ValueSum, any other estimator, a reward or a RewardSum.
        pipe: a pipeline with autoencoder and text encoders. A reward needs it for latents, an estimator for images
            and, where it reads the prompt, for encoding that.
        sigma: noise level of all samples that come without one, in [0, 1]; None if these are images.
        max_sequence_length: rows of the text encoding, for estimators that read the prompt.
        batch_size: samples that are scored together.

    Raises:
        TypeError: something else that scores. ValueError: bad numbers, or no pipeline where one is needed.
    """
    if not isinstance(scorer, ValueEstimator | RewardModel | RewardSum):
        raise TypeError(f"scorer: expected a ValueEstimator, a RewardModel or a RewardSum, got {type(scorer).__name__}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
    if sigma is not None and not 0 <= sigma <= 1:
        raise ValueError(f"sigma: expected a number in [0, 1], got {sigma}")
    if isinstance(scorer, ValueEstimator) and scorer.reads_encoding and pipe is None:
        raise ValueError(f"pipe: expected a pipeline, as {type(scorer).__name__} reads encoded prompts, got None")
    return RewardFunction(scorer, pipe, sigma, max_sequence_length, batch_size)


def _sigma_in(metadata, count: int):
    """The noise level that metadata names: one, or one per sample; None if it names none."""
    if isinstance(metadata, Mapping):
        return metadata.get("sigma")
    if metadata is None:
        return None
    found = [entry.get("sigma") for entry in map(_as_mapping, metadata)]
    if all(level is None for level in found):
        return None
    if len(found) != count or any(level is None for level in found):
        raise ValueError(f"metadata: expected a sigma for each of {count} samples or for none, got {found}")
    return torch.stack([torch.as_tensor(level, dtype=torch.float32).reshape(()).cpu() for level in found])


def _as_mapping(entry) -> Mapping[str, Any]:
    if isinstance(entry, str):
        try:
            entry = json.loads(entry)
        except json.JSONDecodeError:
            return {}
    return entry if isinstance(entry, Mapping) else {}
