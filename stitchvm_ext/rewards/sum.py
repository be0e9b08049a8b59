"""Weighted sums of rewards: normalisation of each, and one pass of every image tower that several of them share.

Raw scales differ by orders of magnitude. On generated images, about:

| reward | range | standard deviation |
| --- | --- | --- |
| cosine of a CLIP, SigLIP or HPSv2 | 0.2 to 0.4 | 0.03 |
| the same times 100 (PickScore) | 18 to 24 | 1 |
| LAION aesthetic predictor | 4.5 to 6.5 | 0.5 |
| ImageReward | -2.3 to 2 | 1 |
| a class logit | -5 to 20 | 3 |

so a raw sum of a cosine and a PickScore is a PickScore. Two cosines may be added as they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .base import RewardModel, RewardOutput

MeanStd = tuple[float, float]
SCALE_RATIO = 10.0  # raw scales further apart than this are warned about
SCORES_SEEN = 8  # scores of each term, at least, before their spread is compared


class WeightedSum:
    """``sum_k w_k (r_k - mean_k) / std_k`` of several scores; without normalisation mean 0 and std 1.

    Args:
        names: of the terms, for messages.
        weights: one per term.
        normalise: (mean, std) per term, or None for raw scores. Without it, terms whose raw standard deviations, and
            whose contributions to the sum, differ more than tenfold are warned about once.

    Raises:
        ValueError: other counts, or numbers that are not finite, or a std that is not positive.
    """

    def __init__(self, names: list[str], weights: list[float], normalise: Sequence[MeanStd] | None = None):
        for number, weight in enumerate(weights):
            if not math.isfinite(weight):
                raise ValueError(f"weight of term {number} ({names[number]}): expected a finite number, got {weight}")
        self.names, self.weights = names, [float(weight) for weight in weights]
        self.normalise = normalise
        self._seen: list[Tensor] | None = []  # raw scores [K, B] until there are enough to compare their spread

    @property
    def normalise(self) -> list[MeanStd] | None:
        """(mean, std) per term, or None."""
        return self._normalise

    @normalise.setter
    def normalise(self, pairs: Sequence[MeanStd] | None) -> None:
        if pairs is not None:
            pairs = [(float(mean), float(std)) for mean, std in pairs]
            if len(pairs) != len(self.weights):
                raise ValueError(f"normalise: expected {len(self.weights)} pairs (mean, std), got {len(pairs)}")
            for name, (mean, std) in zip(self.names, pairs, strict=True):
                if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                    raise ValueError(f"normalise: expected a finite mean and std > 0 for {name}, got ({mean}, {std})")
        self._normalise = pairs

    def __call__(self, scores: list[Tensor]) -> Tensor:
        """Scores [B] of every term -> [B]."""
        if self.normalise is None:
            self._compare_scales(scores)
        means = [mean for mean, _ in self.normalise or [(0.0, 1.0)] * len(scores)]
        return sum(f * (score - mean) for f, mean, score in zip(self.factors, means, scores, strict=True))

    @property
    def factors(self) -> list[float]:
        """w_k / std_k: what every term's raw score and its gradient are multiplied by."""
        pairs = self.normalise or [(0.0, 1.0)] * len(self.weights)
        return [weight / std for weight, (_, std) in zip(self.weights, pairs, strict=True)]

    def _compare_scales(self, scores: list[Tensor]) -> None:
        if self._seen is None:
            return
        self._seen.append(torch.stack([score.detach().float().cpu() for score in scores]))
        raw = torch.cat(self._seen, dim=1)
        if raw.shape[1] < SCORES_SEEN:
            return
        self._seen = None
        spread = raw.std(1)
        added = spread * torch.tensor(self.weights).abs()
        if all(s.min() > 0 and s.max() > SCALE_RATIO * s.min() for s in (spread, added)):
            listed = ", ".join(f"{name} {s:.3g}" for name, s in zip(self.names, spread.tolist(), strict=True))
            warnings.warn(
                f"sum of rewards: the raw scores have standard deviations {listed}, so the largest decides the sum; "
                "normalise each (RewardSum.calibrate measures mean and std), or choose weights that make up for it",
                stacklevel=4,
            )


def _tower_tensors(reward: RewardModel) -> list[Tensor]:
    """Parameters and buffers, scoring heads aside."""
    heads = {id(p) for p in reward.head_parameters()}
    return [t for t in chain(reward.parameters(), reward.buffers()) if id(t) not in heads]


@torch.no_grad()
def share_tower(a: RewardModel, b: RewardModel) -> bool:
    """Whether two rewards see images through the same network: equal weights, and the same output to the bit for an
    image that is neither square nor of the network's size, which tells preprocessing, activations and pooling apart.
    """
    mine, theirs = _tower_tensors(a), _tower_tensors(b)
    same_kind = a.image_size == b.image_size and a.grid == b.grid and len(mine) == len(theirs)
    if not same_kind or not all(
        x is y or (x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y))
        for x, y in zip(mine, theirs, strict=True)
    ):
        return False
    size = 2 * a.image_size[0], a.image_size[1] + a.image_size[1] // 2
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(a.device)
    first, second = a.output(image), b.output(image)
    return torch.equal(first.tokens, second.tokens) and torch.equal(first.embedding, second.embedding)


class RewardSum(nn.Module):
    """``sum_k w_k (r_k - mean_k) / std_k`` over rewards: a clean reward for TweedieValue, MonteCarloValue and reports.

    Rewards that share an image tower (see :func:`share_tower`) get their outputs from one pass of it. A sum is not
    stitched itself: stitch every reward, and add their values with ValueSum, whose ``normalise`` takes this sum's.

    Args:
        terms: pairs (reward, weight).
        normalise: (mean, std) of every reward's raw scores, or None for raw scores; :meth:`calibrate` measures them.

    Raises:
        TypeError: a term that is not a RewardModel and a number. ValueError: no term, a suffix, or bad numbers.
    """

    def __init__(self, terms: Sequence[tuple[RewardModel, float]], normalise: Sequence[MeanStd] | None = None):
        super().__init__()
        terms = list(terms)
        if not terms:
            raise ValueError("terms: expected at least one pair (reward, weight), got none")
        for number, term in enumerate(terms):
            if not isinstance(term, tuple | list) or len(term) != 2 or not isinstance(term[0], RewardModel):
                raise TypeError(f"terms: expected pairs (RewardModel, weight), got {term!r:.200} at position {number}")
            term[0].check_whole()
        rewards = [reward for reward, _ in terms]
        self.weighted = WeightedSum([type(r).__name__ for r in rewards], [w for _, w in terms], normalise)
        self.rewards = nn.ModuleList(rewards)
        # The reward whose tower serves each one: the first that shares it.
        self.towers = [
            next(m for m, other in enumerate(rewards) if other is r or share_tower(other, r)) for r in rewards
        ]

    @property
    def normalise(self) -> list[MeanStd] | None:
        """(mean, std) of every reward's raw scores, or None; may be set."""
        return self.weighted.normalise

    @normalise.setter
    def normalise(self, pairs: Sequence[MeanStd] | None) -> None:
        self.weighted.normalise = pairs

    @property
    def device(self) -> torch.device:
        return self.rewards[0].device

    def output(self, images: Tensor, pooled_only: bool = False) -> list[RewardOutput]:
        """Every reward's output on images [B, 3, H, W] in [0, 1], see :meth:`RewardModel.output`."""
        passes = {tower: self.rewards[tower].output(images, pooled_only) for tower in sorted(set(self.towers))}
        return [passes[tower] for tower in self.towers]

    def encode_condition(self, prompts: list[str] | tuple[str, ...]) -> list[Any]:
        return [reward.encode_condition(prompts) for reward in self.rewards]

    def raw_scores(self, output: list[RewardOutput], condition: list[Any]) -> list[Tensor]:
        """Every reward's own score [B], not weighted and not normalised."""
        return [r.score(o, c) for r, o, c in zip(self.rewards, output, condition, strict=True)]

    def score(self, output: list[RewardOutput], condition: list[Any]) -> Tensor:
        """The sum [B] in float32."""
        return self.weighted(self.raw_scores(output, condition))

    def forward(self, images: Tensor, prompts: list[str] | tuple[str, ...] | None = None) -> Tensor:
        """The sum [B] for images [B, 3, H, W] in [0, 1] and their prompts."""
        return self.score(self.output(images, pooled_only=True), self._conditions(images, prompts))

    def _conditions(self, images: Tensor, prompts: Sequence[str] | None) -> list[Any]:
        if prompts is None:
            return [None] * len(self.rewards)
        if len(prompts) != len(images):
            raise ValueError(f"prompts: expected {len(images)}, one per image, got {len(prompts)}")
        return self.encode_condition(prompts)

    @torch.no_grad()
    def calibrate(self, images: Tensor, prompts: Sequence[str] | None = None, batch_size: int = 32) -> list[MeanStd]:
        """Measure mean and standard deviation of every reward on images [N, 3, H, W] in [0, 1] and normalise by them.

        The images should be of the kind that will be scored, with their prompts: a few hundred of the generator's own.

        Returns:
            the pairs (mean, std), now :attr:`normalise`; kept elsewhere, they make the same sum again.
        Raises:
            ValueError: fewer than two images, or a reward that gives them all one score.
        """
        if len(images) < 2:
            raise ValueError(f"images: expected at least 2 to measure a spread, got {len(images)}")
        rows = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            condition = self._conditions(images[part], None if prompts is None else prompts[part])
            output = self.output(images[part].to(self.device), pooled_only=True)
            rows.append(torch.stack(self.raw_scores(output, condition)).double().cpu())
        scores = torch.cat(rows, dim=1)
        pairs = list(zip(scores.mean(1).tolist(), scores.std(1).tolist(), strict=True))
        for name, (mean, std) in zip(self.weighted.names, pairs, strict=True):
            if not std > 1e-6 * abs(mean):
                raise ValueError(f"images: expected ones that {name} tells apart; it gives all of them {mean:g}")
        self.normalise = pairs
        return pairs
