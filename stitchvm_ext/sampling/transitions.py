"""One step from noise level t to t' < t.

Every transition has the same signature and reads nothing but the velocity, guided or not: along a rectified flow the
score is ``-((1-t) u + z) / t``, so a velocity ``u - c grad V`` carries the guided score ``score + (1-t)/t c grad V``
with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from torch import Tensor

Transition = Callable[[Tensor, Tensor, float, float, "Tensor | None"], Tensor]
"""``(latents, velocity, sigma, sigma_next, noise) -> next latents``, float32. The noise is standard normal, like the
latents; a deterministic transition ignores it."""


def score(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """``grad log p_t(z_t) = -((1-t) u + z) / t`` in float32 (METHOD.md §1), sigma in (0, 1]."""
    return -((1 - sigma) * velocity.float() + latents.float()) / sigma


def in_float32(step: Transition) -> Transition:
    """Run a transition's arithmetic in float32 whatever the model's dtype, and end every trajectory without noise.

    The step to t' = 0 is the Euler step to the denoised estimate ``z - t u``, as in ancestral samplers: noise added
    there would stay in the image.
    """

    @functools.wraps(step)
    def checked(latents, velocity, sigma: float, sigma_next: float, noise=None, **options) -> Tensor:
        if not 0 <= sigma_next < sigma <= 1:
            raise ValueError(f"sigma, sigma_next: expected 0 <= sigma_next < sigma <= 1, got {sigma:g}, {sigma_next:g}")
        latents, velocity = latents.float(), velocity.float()
        if sigma_next == 0:
            return latents - sigma * velocity
        return step(latents, velocity, sigma, sigma_next, noise, **options)

    return checked


@in_float32
def ode(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Tensor | None = None) -> Tensor:
    """Euler step of the probability-flow ODE, ``dz = u dt``: what the pipeline's own scheduler does."""
    return latents + (sigma_next - sigma) * velocity


def reverse_sde(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Tensor, nu: float) -> Tensor:
    """Euler-Maruyama step of ``dz = [u - (nu²/2) score] dt + nu dW`` (METHOD.md §5): the ODE's marginals for any nu."""
    dt = sigma_next - sigma
    drift = velocity - 0.5 * nu**2 * score(latents, velocity, sigma)
    return latents + drift * dt + nu * math.sqrt(-dt) * noise.float()


@in_float32
def linear_sde(
    latents: Tensor,
    velocity: Tensor,
    sigma: float,
    sigma_next: float,
    noise: Tensor,
    *,
    g: Callable[[float], float] | None = None,
) -> Tensor:
    """The reverse SDE with ``nu = g(t)``, by default ``3 t²`` (linear SDE of Kim et al., Inference-Time Scaling for
    Flow Models).
    """
    return reverse_sde(latents, velocity, sigma, sigma_next, noise, nu=g(sigma) if g else 3 * sigma**2)


@in_float32
def flow_grpo(
    latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Tensor, *, noise_level: float = 0.7
) -> Tensor:
    """The reverse SDE with ``nu = a sqrt(t / (1-t))``, a the noise level (Flow-GRPO).

    nu is infinite at t = 1, where the step takes ``1-t`` from its far end, as the published code does.
    """
    remaining = 1 - (sigma if sigma < 1 else sigma_next)
    return reverse_sde(latents, velocity, sigma, sigma_next, noise, nu=noise_level * math.sqrt(sigma / remaining))


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
