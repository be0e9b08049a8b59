"""How far a value gradient bends the velocity at each step: ``u' = u - c_t grad V`` (METHOD.md §5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("relative", "score", "raw")
BETWEEN = ("none", "last")

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda sigma: 1.0,
    "sigma": lambda sigma: sigma,  # strongest at pure noise, gone at the clean end
    "alpha": lambda sigma: 1 - sigma,  # follows the signal scale alpha_t: gone at pure noise
}


@dataclass(frozen=True)
class Guidance:
    """When to guide and how strongly.

    With w the schedule's weight at noise level t, the velocity becomes ``u - c grad V`` where, per sample,

    - ``mode="relative"``: ``c = strength w ||u|| / ||grad V||``. The strength is the length of the guidance relative
      to the velocity's, whatever the scale of the reward. A zero gradient gives no guidance.
    - ``mode="score"``: ``c = strength w t/(1-t)``, which adds ``strength grad V`` to the score. With the soft value of
      ``strength * reward`` (over strength) this samples the tilted distribution ``p exp(strength reward)`` itself
      (METHOD.md §2), for every transition. At t = 1, where c is infinite and a latent that is pure noise tells
      nothing, the step is not guided.
    - ``mode="raw"``: ``c = strength w``.

    Attributes:
        strength: at least 0; 0 is plain sampling. Negative values are refused: negate the reward instead.
        mode: one of ``MODES``.
        schedule: weight over the noise level: a name in ``SCHEDULES`` or a callable from sigma in [0, 1] to a finite
            number >= 0. Steps of weight 0 are not guided and cost no value evaluation.
        window: half-open range (first, end) of step indices that may be guided; an end of None means the last step.
        every: ask for a gradient at the window's first step and every ``every``-th after it.
        between: what the window's other steps do: "none" is not guided, "last" goes on with the latest gradient, at the
            strength that the step itself has. Neither evaluates the value.
    """

    strength: float = 0.2
    mode: str = "relative"
    schedule: str | Callable[[float], float] = "constant"
    window: tuple[int, int | None] = (0, None)
    every: int = 1
    between: str = "none"

    def __post_init__(self):
        if isinstance(self.strength, bool) or not isinstance(self.strength, (int, float)):
            raise TypeError(f"strength: expected a number, got {type(self.strength).__name__}")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f"strength: expected a finite number >= 0, got {self.strength}")
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {list(MODES)}, got {self.mode!r}")
        if not callable(self.schedule) and self.schedule not in list(SCHEDULES):
            raise ValueError(f"schedule: expected a callable or one of {sorted(SCHEDULES)}, got {self.schedule!r}")
        if not _is_window(self.window):
            raise ValueError(
                f"window: expected step indices (first, end) with 0 <= first < end, or end None, got {self.window!r}"
            )
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: expected an integer >= 1, got {self.every!r}")
        if self.between not in BETWEEN:
            raise ValueError(f"between: expected one of {list(BETWEEN)}, got {self.between!r}")

    def weight(self, sigma: float) -> float:
        """The schedule's w at a noise level. ValueError where a callable yields a negative or non-finite number."""
        schedule = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        weight = float(schedule(sigma))
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"schedule: expected a finite weight >= 0 at sigma {sigma:g}, got {weight}")
        return weight

    def is_active(self, step: int, sigma: float) -> bool:
        """Whether step number ``step``, which starts at noise level ``sigma``, asks for a gradient and is guided."""
        return (step - self.window[0]) % self.every == 0 and self._is_open(step, sigma)

    def goes_on(self, step: int, sigma: float) -> bool:
        """Whether a step that asks for no gradient is guided by the latest one."""
        return self.between == "last" and self._is_open(step, sigma)

    def _is_open(self, step: int, sigma: float) -> bool:
        first, end = self.window
        if not (first <= step and (end is None or step < end)):
            return False
        if self.strength == 0 or (self.mode == "score" and sigma >= 1):
            return False
        return self.weight(sigma) > 0

    def check_task(self, task) -> None:
        """Raises ValueError where there is a value and a strength, and no step of the schedule that is guided."""
        steps = list(enumerate(task.sigmas[:-1].tolist()))
        if task.denoiser.value is None or self.strength == 0:
            return
        if not any(self.is_active(step, sigma) for step, sigma in steps):
            raise ValueError(
                f"window, schedule: expected at least one guided step out of {len(steps)}, got none with window "
                f"{self.window} and schedule {self.schedule!r}"
            )

    def amount(self, sigma: float) -> float:
        """c at a noise level; in relative mode without the norms' ratio."""
        amount = self.strength * self.weight(sigma)
        return amount * sigma / (1 - sigma) if self.mode == "score" else amount

    def term(self, velocity: Tensor, grad: Tensor, sigma: float) -> Tensor:
        """``c_t grad V``, float32 [B, ...]: what is subtracted from the velocity. Norms are per sample, never over the
        batch.
        """
        grad, amount = grad.float(), self.amount(sigma)
        if self.mode == "relative":
            return amount * _norm(velocity.float()) * _unit(grad)
        return amount * grad


def check_finite(step: int, sigma: float, **tensors: Tensor) -> None:
    """Stop with FloatingPointError that names the step, the tensor and the samples where a value is not finite."""
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            samples = (~finite).flatten(1).any(1) if tensor.ndim > 1 else ~finite
            where = samples.nonzero().flatten().tolist()
            raise FloatingPointError(f"{name}: non-finite values at step {step} (sigma {sigma:g}) in samples {where}")


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm per sample, shaped to broadcast against ``x``."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))


def _unit(x: Tensor) -> Tensor:
    """``x / ||x||`` per sample, 0 for 0. Divides by the largest entry first: squares of 1e-25 or 1e25 do not fit
    float32.
    """
    largest = x.flatten(1).abs().amax(1).view(-1, *[1] * (x.ndim - 1))
    scaled = x / torch.where(largest > 0, largest, 1)
    return scaled / _norm(scaled).clamp_min(1)  # the norm is at least 1 unless x is 0


def _is_window(window) -> bool:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        return False
    first, end = window
    is_index = lambda x: isinstance(x, int) and not isinstance(x, bool)  # noqa: E731
    return is_index(first) and first >= 0 and (end is None or (is_index(end) and end > first))
