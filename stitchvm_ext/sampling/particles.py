"""Weights of particles (Feynman-Kac steering, METHOD.md §5): potentials, effective sample size, resampling.

S independent samples hold K particles each. All of it is a few numbers per particle, in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

POTENTIALS = ("diff", "max", "sum")


class ParticleWeights:
    """Log-weights of particles under one of the potentials of FK steering (Singhal et al., 2501.06848).

    With V the values at one event and lambda the ``scale``, the potential is

    - "diff": ``exp(lambda (V - V of the event before))``, which telescopes;
    - "max": ``exp(lambda max V)`` over the events so far;
    - "sum": ``exp(lambda sum V)`` over the events so far.

    The last event divides by the product of those before along each particle's ancestry, so that the whole path weighs
    ``exp(lambda reward)`` whatever the potential. Weights are carried on through events that do not resample.

    Args:
        samples, particles: S and K.
        potential: one of ``POTENTIALS``.
        scale: lambda, at least 0.
        target_ess: in place of the scale, the share of K in (0, 1] that the effective sample size of every event's own
            potentials shall have: lambda then follows from the values, whatever their unit. The paths then have no
            common temperature, and no evidence.

    Attributes:
        log_weights: [S, K], 0 after resampling.
        log_potential: [S, K], log of the product of the potentials along each particle's ancestry.
    """

    def __init__(
        self,
        samples: int,
        particles: int,
        potential: str = "diff",
        scale: float = 1.0,
        target_ess: float | None = None,
    ):
        if potential not in POTENTIALS:
            raise ValueError(f"potential: expected one of {list(POTENTIALS)}, got {potential!r}")
        check_scale("scale", scale)
        if target_ess is not None:
            check_share("target_ess", target_ess)
        self.potential, self.scale, self.target_ess = potential, float(scale), target_ess
        self.log_weights = torch.zeros(samples, particles, dtype=torch.float64)
        self.log_potential = torch.zeros_like(self.log_weights)
        self._seen: Tensor | None = None  # the last values; for "max" and "sum" these of the events so far
        self._log_means = torch.zeros(samples, dtype=torch.float64)  # of the weights that were resampled away

    def update(self, values: Tensor, final: bool = False) -> None:
        """Weigh the particles by their values [S, K]; ``final`` for the rewards of the finished samples.

        Raises FloatingPointError for NaN or +inf, and where every particle of a sample has weight 0.
        """
        values = values.detach().double().cpu().view_as(self.log_weights)
        check_values(values)
        score = values
        if self._seen is not None and not final and self.potential != "diff":
            score = torch.maximum(self._seen, values) if self.potential == "max" else self._seen + values
        ruled_out = score.isneginf() | self.log_potential.isneginf()
        score = score.masked_fill(ruled_out, 0.0)
        if self.target_ess is not None:
            increment = score - self._seen.nan_to_num(neginf=0.0) if self._telescopes else score
            increment = increment.masked_fill(ruled_out, -math.inf)
            increment = scale_for_ess(increment, self.target_ess)[:, None] * increment.masked_fill(ruled_out, 0.0)
        else:
            # "diff" and the last event say what the whole path weighs, "max" and "sum" what this event adds.
            whole = final or self.potential == "diff"
            increment = self.scale * score - (self.log_potential if whole else 0.0)
        increment = increment.masked_fill(ruled_out, -math.inf)
        self.log_weights = self.log_weights + increment
        self.log_potential = self.log_potential + increment
        self._seen = score.masked_fill(ruled_out, -math.inf)
        self._check_alive()

    def correct(self, log_ratio: Tensor) -> None:
        """Account for a proposal q in place of the transition p: adds ``log p(z') - log q(z')`` [S, K]."""
        self.log_weights = self.log_weights + log_ratio.detach().double().cpu().view_as(self.log_weights)
        self._check_alive()

    def resample(self, uniforms: Tensor, scheme: str = "systematic", threshold: float = 0.5) -> Tensor:
        """Ancestors int64 [S, K]: drawn by weight where the effective sample size is below ``threshold * K``, each
        particle its own elsewhere.

        Args:
            uniforms: [S, K] in [0, 1).
        """
        samples, particles = self.log_weights.shape
        ancestors = torch.arange(particles).repeat(samples, 1)
        ess = effective_sample_size(self.log_weights)
        for s in (ess < threshold * particles * (1 - 1e-9)).nonzero().flatten().tolist():
            ancestors[s] = RESAMPLERS[scheme](self.log_weights[s].softmax(0), uniforms[s].double().cpu())
            self._log_means[s] += self.log_weights[s].logsumexp(0) - math.log(particles)
            self.log_weights[s] = 0
            self.log_potential[s] = self.log_potential[s, ancestors[s]]
            if self._seen is not None:
                self._seen[s] = self._seen[s, ancestors[s]]
        return ancestors

    @property
    def log_evidence(self) -> Tensor:
        """[S]: log of an unbiased estimate of ``E exp(lambda reward)`` once the last event was weighed (the normalising
        constant of the tilted distribution, METHOD.md §1); NaN with ``target_ess``.
        """
        if self.target_ess is not None:
            return torch.full_like(self._log_means, math.nan)
        return self._log_means + self.log_weights.logsumexp(1) - math.log(self.log_weights.shape[1])

    @property
    def _telescopes(self) -> bool:
        return self.potential == "diff" and self._seen is not None

    def _check_alive(self) -> None:
        dead = self.log_weights.isneginf().all(1).nonzero().flatten().tolist()
        if dead:
            raise FloatingPointError(f"value: every particle of samples {dead} has weight 0")


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """``(sum w)² / sum w²`` over the last dimension, in 1..K."""
    return 1 / log_weights.softmax(-1).square().sum(-1)


def scale_for_ess(scores: Tensor, target: float) -> Tensor:
    """The lambda [S] at which the weights ``exp(lambda scores)`` of scores [S, K] have an effective sample size of
    ``target * K``: by bisection. 0 where the scores are all equal; where ties at the top keep the size above, lambda
    is what all but drops the others.
    """
    # Scores in units of their spread: lambda is then of order one, whatever the reward's unit.
    finite = scores.isfinite()
    top = scores.masked_fill(~finite, -math.inf).amax(1, keepdim=True)
    spread = (top - scores.masked_fill(~finite, math.inf).amin(1, keepdim=True)).clamp_min(0)
    gaps = ((scores - top) / spread.clamp_min(torch.finfo(scores.dtype).tiny)).nan_to_num(neginf=-1e9)
    low, high = torch.zeros_like(top), torch.full_like(top, 1e4)
    wanted = target * scores.shape[1]
    for _ in range(60):
        middle = (low + high) / 2
        enough = effective_sample_size(middle * gaps)[:, None] > wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(spread > 0, high / spread.clamp_min(torch.finfo(scores.dtype).tiny), 0).squeeze(1)


# -- resampling: weights [K] that add up to 1 and uniforms [K] in [0, 1) to ancestors [K] ------------------------------


def _inverse(weights: Tensor, points: Tensor) -> Tensor:
    """Indices at which the cumulated weights pass the points; never one of weight 0."""
    cumulated = weights.cumsum(0)
    last = weights.nonzero().max()  # a point of 1, after rounding, is beyond all of them
    return torch.searchsorted(cumulated / cumulated[-1], points, right=True).clamp_max(last)


def systematic(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One uniform and equal steps from there: particle k gets ``floor`` or ``ceil`` of ``K w_k`` copies."""
    count = len(weights)
    return _inverse(weights, (torch.arange(count) + uniforms[0]) / count)


def multinomial(weights: Tensor, uniforms: Tensor) -> Tensor:
    """K independent draws."""
    return _inverse(weights, uniforms)


def residual(weights: Tensor, uniforms: Tensor) -> Tensor:
    """``floor(K w_k)`` copies of each, and independent draws from what remains."""
    count = len(weights)
    copies = (count * weights + 1e-9).floor()
    sure = torch.repeat_interleave(torch.arange(count), copies.long())
    left = (count * weights - copies).clamp_min(0)
    return torch.cat([sure, _inverse(left, uniforms[len(sure) :])]) if len(sure) < count else sure


RESAMPLERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": systematic,
    "multinomial": multinomial,
    "residual": residual,
}


# -- checks ------------------------------------------------------------------------------------------------------------


def check_values(values: Tensor) -> None:
    """Raises FloatingPointError for NaN or +inf in values [S, ...]. A value of -inf rules its particle out."""
    bad = (values.isnan() | values.isposinf()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(f"value: expected numbers below +inf, got NaN or +inf in samples {bad}")


def check_scale(name: str, scale) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(scale).__name__}")
    if not 0 <= scale < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {scale}")


def check_share(name: str, share) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(share).__name__}")
    if not 0 < share <= 1:
        raise ValueError(f"{name}: expected a share in (0, 1], got {share}")
