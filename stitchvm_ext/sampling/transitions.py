"""One step from noise level t to t' < t.

Every transition has the same signature and reads nothing but the velocity, guided or not: along a rectified flow the
score is ``-((1-t) u + z) / t``, so a velocity ``u - c grad V`` carries the guided score ``score + (1-t)/t c grad V``
with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Transition = Callable[[Tensor, Tensor, float, float, "Tensor | None"], Tensor]
"""``(latents, velocity, sigma, sigma_next, noise) -> next latents``, float32. The noise is standard normal, like the
latents; a deterministic transition ignores it."""


def score(latents, velocity, sigma: float):
    """``grad log p_t(z_t) = -((1-t) u + z) / t`` (METHOD.md §1) of numbers or float32 tensors, sigma in (0, 1]."""
    return -((1 - sigma) * velocity + latents) / sigma


@dataclass(frozen=True)
class ReverseSDE:
    """Euler-Maruyama steps of ``dz = [u - (nu²/2) score] dt + nu dW`` (METHOD.md §5): the ODE's marginals for any nu.

    The step to t' = 0 is the Euler step to the denoised estimate ``z - t u``, as in ancestral samplers: noise added
    there would stay in the image.

    Attributes:
        nu: of (sigma, sigma_next) and the options that a call passes on.
    """

    nu: Callable[..., float]

    def coefficients(self, sigma: float, sigma_next: float, **options) -> tuple[float, float, float]:
        """The step as factors (of the latents, of the velocity, of the noise)."""
        if not 0 <= sigma_next < sigma <= 1:
            raise ValueError(f"sigma, sigma_next: expected 0 <= sigma_next < sigma <= 1, got {sigma:g}, {sigma_next:g}")
        nu = self.nu(sigma, sigma_next, **options) if sigma_next > 0 else 0.0
        dt = sigma_next - sigma
        drift = lambda latents, velocity: velocity - 0.5 * nu**2 * score(latents, velocity, sigma)  # noqa: E731
        return 1 + dt * drift(1.0, 0.0), dt * drift(0.0, 1.0), nu * math.sqrt(-dt)

    def __call__(
        self,
        latents: Tensor,
        velocity: Tensor,
        sigma: float,
        sigma_next: float,
        noise: Tensor | None = None,
        **options,
    ) -> Tensor:
        """One step in float32, whatever the model's dtype."""
        of_latents, of_velocity, of_noise = self.coefficients(sigma, sigma_next, **options)
        step = of_latents * latents.float() + of_velocity * velocity.float()
        return step + of_noise * noise.float() if of_noise else step


def _linear(sigma: float, sigma_next: float, g: Callable[[float], float] | None = None) -> float:
    return g(sigma) if g else 3 * sigma**2


def _flow_grpo(sigma: float, sigma_next: float, noise_level: float = 0.7) -> float:
    return noise_level * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_next)))


ode = ReverseSDE(lambda sigma, sigma_next: 0.0)
"""The probability-flow ODE, ``dz = u dt``: what the pipeline's own scheduler does."""

linear_sde = ReverseSDE(_linear)
"""``nu = g(t)``, an option, by default ``3 t²`` (linear SDE of Kim et al., Inference-Time Scaling for Flow Models)."""

flow_grpo = ReverseSDE(_flow_grpo)
"""``nu = a sqrt(t / (1-t))`` with the option a = ``noise_level`` (Flow-GRPO). It is infinite at t = 1, where the step
takes ``1-t`` from its far end, as the published code does."""


def dpm_solver_2m(
    latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, previous: tuple[Tensor, float] | None = None
) -> tuple[Tensor, tuple[Tensor, float]]:
    """One step of the second-order multistep DPM-Solver++ (Lu et al. 2022) along a rectified flow, in float32.

    It integrates the denoised estimate ``D = z - t u`` over ``lambda = log((1-t)/t)``:
    ``z' = (t'/t) z + (1 - t'/t) (D + (D - D_before) / 2r)``, r being the last step's length in lambda over this one's.
    Without a step before, from t = 1 on (where lambda is infinite) and down to t' = 0 it is the first-order step, that
    of the ODE.

    Args:
        previous: what the step before returned second.

    Returns:
        the next latents; the denoised estimate and the noise level, for the next step.
    """
    denoised = latents.float() - sigma * velocity.float()
    slope = 0.0
    if previous is not None and previous[1] < 1 and sigma_next > 0:
        log_ratio = lambda t: math.log((1 - t) / t)  # noqa: E731
        before, now, after = (log_ratio(t) for t in (previous[1], sigma, sigma_next))
        slope = (denoised - previous[0]) * (0.5 * (after - now) / (now - before))
    ratio = sigma_next / sigma
    return ratio * latents.float() + (1 - ratio) * (denoised + slope), (denoised, sigma)


TRANSITIONS: dict[str, Transition] = {"ode": ode, "linear_sde": linear_sde, "flow_grpo": flow_grpo}


def get_transition(transition: str | Transition) -> Transition:
    """A transition by name, or a callable of the same signature as it is.

    Raises:
        ValueError: unknown name. TypeError: neither a name nor callable.
    """
    if callable(transition):
        return transition
    if not isinstance(transition, str):
        raise TypeError(f"transition: expected a name or a callable, got {type(transition).__name__}")
    if transition not in TRANSITIONS:
        raise ValueError(f"transition: expected one of {sorted(TRANSITIONS)}, got {transition!r}")
    return TRANSITIONS[transition]
