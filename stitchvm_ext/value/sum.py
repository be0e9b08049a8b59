"""Weighted sums of values: the stitched ones among them read one pass through the backbone's prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backbones import Condition, Encoding, is_same_encoding
from ..backbones.replay import can_replay, recorded
from ..rewards.sum import MeanStd, WeightedSum
from .base import ValueEstimator
from .carry import Carry, PrefixCarry
from .side_stream import side_stream
from .stitched import StitchedValue, rows_read_by


class ValueSum(ValueEstimator):
    """``sum_k w_k (V_k - mean_k) / std_k`` over values of one backbone.

    Stitched values share one pass through the prefix, up to the deepest of their cuts; the shallower ones read it on
    the way. With classifier-free guidance and an empty negative prompt that pass is the unconditional branch's own, as
    for a single stitched value. Others (Tweedie, stitched ones without backbone blocks or with another null text) run
    by themselves.

    Args:
        terms: pairs (value, weight).
        normalise: (mean, std) of every reward's raw scores, as :meth:`RewardSum.calibrate` measures them on clean
            images; None for raw values.

    Raises:
        TypeError: a term that is not a ValueEstimator and a number.
        ValueError: no term, values on different denoisers, or bad numbers.
    """

    def __init__(self, terms: Sequence[tuple[ValueEstimator, float]], normalise: Sequence[MeanStd] | None = None):
        terms = list(terms)
        if not terms:
            raise ValueError("terms: expected at least one pair (value, weight), got none")
        for number, term in enumerate(terms):
            if not isinstance(term, tuple | list) or len(term) != 2 or not isinstance(term[0], ValueEstimator):
                raise TypeError(
                    f"terms: expected pairs (ValueEstimator, weight), got {type(term)} at position {number}"
                )
        self.values = [value for value, _ in terms]
        self.backbone = self.values[0].backbone
        for number, value in enumerate(self.values):
            if value.backbone.denoiser is not self.backbone.denoiser:
                raise ValueError(f"terms: expected values on one denoiser, got another one at position {number}")
        self.weighted = WeightedSum([_name(v) for v in self.values], [w for _, w in terms], normalise)

        stitched = [v for v in self.values if isinstance(v, StitchedValue) and v.depth > 0]
        # Positions of those that share the prefix: of the null text, or of the prompts.
        self.shared = [k for k, v in enumerate(self.values) if v in stitched and _read_same_text(v, stitched[0])]
        self.separate = [k for k in range(len(self.values)) if k not in self.shared]
        self.depths = sorted({self.values[k].depth for k in self.shared})
        # What a sampler asks of a value that was made for one latent size and one way to encode texts.
        self.text_options = stitched[0].text_options if stitched else {}

    @property
    def normalise(self) -> list[MeanStd] | None:
        """(mean, std) of every value's raw scores, or None; may be set."""
        return self.weighted.normalise

    @normalise.setter
    def normalise(self, pairs: Sequence[MeanStd] | None) -> None:
        self.weighted.normalise = pairs

    @property
    def reads_encoding(self) -> bool:
        return any(value.reads_encoding for value in self.values)

    def check_latent_size(self, latent_size: tuple[int, int]) -> None:
        """Raises ValueError unless every value can read latents of this (H, W)."""
        for value in self.values:
            if hasattr(value, "check_latent_size"):
                value.check_latent_size(latent_size)

    @classmethod
    def mean(cls, values: Sequence[ValueEstimator]) -> ValueSum:
        """The average of several estimates."""
        return cls([(value, 1 / len(values)) for value in values])

    # -- the shared prefix ---------------------------------------------------------------------------------------------

    def _prefix(self, latents: Tensor, condition: Condition) -> dict:
        """Arguments of the backbone's ``…_at`` calls beyond latents and noise level."""
        values = [self.values[k] for k in self.shared]
        for value in values:
            value.check_latent_size(latents.shape[-2:])
        return {
            "encoding": values[0].text_of(condition),
            "depths": self.depths,
            "rows": rows_read_by([value for value in values if value.depth == self.depths[-1]], latents),
            "memory": "recompute" if any(value.memory == "recompute" for value in values) else "save",
        }

    def _scores(self, tokens: dict[int, Tensor], condition: Condition) -> dict[int, Tensor]:
        """Raw scores [B] of the values that share the prefix, by position."""
        return {k: self.values[k].score_tokens(tokens[self.values[k].depth], condition) for k in self.shared}

    def _partial(self, scores: dict[int, Tensor]) -> Tensor:
        """The weighted sum of some raw scores over terms and samples, for its gradient."""
        return sum(self.weighted.factors[k] * score.sum() for k, score in scores.items())

    def _total(self, scores: dict[int, Tensor]) -> Tensor:
        return self.weighted([scores[k] for k in range(len(self.values))])

    def _separate_with_grad(
        self, latents: Tensor, sigma, condition: Condition
    ) -> tuple[dict[int, Tensor], Tensor | int]:
        scores, grad = {}, 0
        for k in self.separate:
            scores[k], own = self.values[k].value_and_grad(latents, sigma, condition)
            grad = grad + self.weighted.factors[k] * own
        return scores, grad

    # -- the estimator -------------------------------------------------------------------------------------------------

    def value(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        return self.weighted(self.raw_values(latents, sigma, condition))

    def raw_values(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> list[Tensor]:
        """Every term's own value [B], not weighted and not normalised; differentiable like :meth:`value`."""
        self.check_condition(latents, condition)
        scores = {k: self.values[k].value(latents, sigma, condition) for k in self.separate}
        if self.shared:
            scores |= self._scores(
                self.backbone.features_at(latents, sigma, **self._prefix(latents, condition)), condition
            )
        return [scores[k] for k in range(len(self.values))]

    def value_and_grad(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """As the base class says. Raises TypeError with a term that has no gradient (MonteCarloValue)."""
        self.check_condition(latents, condition)
        scores, grad = self._separate_with_grad(latents, sigma, condition)
        if self.shared:
            with torch.inference_mode(False), torch.enable_grad():
                leaf = latents.detach().clone().requires_grad_()
                shared = self._scores(
                    self.backbone.features_at(leaf, sigma, **self._prefix(leaf, condition)), condition
                )
                (own,) = torch.autograd.grad(self._partial(shared), leaf)
            scores |= {k: score.detach() for k, score in shared.items()}
            grad = grad + own.float()
        return self._total(scores), grad

    @torch.no_grad()
    def value_and_carry(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Carry | None]:
        """As :meth:`StitchedValue.value_and_carry`, for the values that share the prefix."""
        if not self.can_share(condition) or not can_replay(self.backbone.denoiser, self.backbone.blocks):
            return super().value_and_carry(latents, sigma, condition)
        self.check_condition(latents, condition)
        with recorded(self.backbone.blocks[: self.depths[-1]]) as outputs:
            tokens = self.backbone.features_at(latents, sigma, **self._prefix(latents, condition), whole=True)
        scores = self._scores(tokens, condition)
        scores |= {k: self.values[k].value(latents, sigma, condition) for k in self.separate}
        return self._total(scores), PrefixCarry(self.values[self.shared[0]], outputs)

    def is_null_text(self, encoding: Encoding | None) -> bool:
        return bool(self.shared) and self.values[self.shared[0]].is_null_text(encoding)

    def can_share(self, condition: Condition) -> bool:
        return bool(self.shared) and self.values[self.shared[0]].can_share(condition)

    def shared_branches(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """As :meth:`StitchedValue.shared_branches`."""
        first = self.values[self.shared[0]]
        with self.backbone.fused(), torch.inference_mode(False), torch.enable_grad():
            shared_velocity, tokens, leaf = self.backbone.velocity_and_features_at(
                latents, sigma, **self._prefix(latents, condition)
            )
            with side_stream(latents.device) as join:
                entering = {depth: t.detach().requires_grad_() for depth, t in tokens.items()}
                shared = self._scores(entering, condition)
                token_grads = torch.autograd.grad(self._partial(shared), list(entering.values()))
            with torch.no_grad():
                other = first.other_branch(condition)
                other_velocity = None if other is None else self.backbone.velocity(latents, sigma, other)
            join(*shared.values(), *token_grads)
            (own,) = torch.autograd.grad(list(tokens.values()), leaf, token_grads)
        scores, grad = self._separate_with_grad(latents, sigma, condition)
        scores |= {k: score.detach() for k, score in shared.items()}
        cond, uncond = first.as_branches(shared_velocity, other_velocity)
        return cond, uncond, self._total(scores), grad + own.float()

    def branches_with_value(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """As the base class says; where a branch runs the prefix that the values need, it serves them too."""
        self.check_condition(latents, condition)
        if self.can_share(condition):
            return self.shared_branches(latents, sigma, condition)
        return super().branches_with_value(latents, sigma, condition)


def _read_same_text(value: StitchedValue, other: StitchedValue) -> bool:
    if value.prompt_conditioned or other.prompt_conditioned:
        return value.prompt_conditioned and other.prompt_conditioned
    return is_same_encoding(value.null_condition, other.null_condition)


def _name(value: ValueEstimator) -> str:
    reward = getattr(value, "suffix", None) or getattr(value, "reward", None)
    return type(value).__name__ if reward is None else f"{type(value).__name__}({type(reward).__name__})"
