"""One step of a guided sampler: classifier-free guidance, value-gradient guidance and integration in two passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _loader, reference
from ._checks import shape_of

# By the model's dtype; the latents are float64 with a float64 model and float32 otherwise.
KERNELS = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def guidance_step(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    grad: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    strength: float = 0.0,
    relative: bool = True,
    latents_coef: float = 1.0,
    velocity_coef: float = 1.0,
    noise_coef: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`latents_coef * z + velocity_coef * (u - c * grad) + noise_coef * noise` and the norms of u and grad.

    u = uncond + guidance_scale * (cond - uncond) (classifier-free guidance, arXiv:2207.12598), or cond without uncond.
    With `relative`, c = strength * ||u|| / ||grad|| per sample, so that the strength does not depend on the scale of
    the gradient, and a zero gradient gives no guidance; otherwise c = strength (METHOD.md §5).

    Everything is computed in float32 whatever the model's dtype, squares that do not fit it in float64; with float64
    latents everything in float64. A sample's result does not depend on its batch. A norm that is not finite tells that
    some velocity or gradient is not (or that the norm is beyond float32), without another pass over them. There is no
    gradient.

    Args:
        latents: z [B, ...], float32 or float64. The kernels take float64 latents with a float64 model alone.
        cond: velocity under the prompt, shape and device of latents, any floating-point dtype.
        uncond: velocity under the negative prompt, like cond; None without classifier-free guidance.
        grad: gradient of the value, like latents; None for a step that is not guided.
        noise: standard normal noise, like latents; None where noise_coef is 0.
        guidance_scale, strength, latents_coef, velocity_coef, noise_coef: finite numbers.
        relative: whether the strength is relative to the velocity's norm.
        backend: "reference", "cpu" or "cuda"; None takes the kernel for cond's device and dtype where there is one
            (see `stitchvm info`) and the reference otherwise.

    Returns:
        the next latents, like latents, contiguous; and norms [B, 2], dtype of latents: ||u|| and ||grad|| (0 without a
        gradient).

    Raises:
        TypeError: an argument is not a tensor or not a number, or a dtype does not fit.
        ValueError: a shape, device, number or backend does not fit, noise is missing, or a tensor requires grad while
            grad mode is on.
        RuntimeError: the backend asked for is not available.
    """
    _check(latents, cond, uncond, grad, noise)
    numbers = {
        "guidance_scale": guidance_scale,
        "strength": strength,
        "latents_coef": latents_coef,
        "velocity_coef": velocity_coef,
        "noise_coef": noise_coef,
    }
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"guidance_step: {name}: expected a number, got {type(number).__name__}")
        if not math.isfinite(number):
            raise ValueError(f"guidance_step: {name}: expected a finite number, got {number}")
    if not isinstance(relative, bool):
        raise TypeError(f"guidance_step: relative: expected a bool, got {type(relative).__name__}")
    if noise is None and noise_coef != 0:
        raise ValueError(f"guidance_step: noise: expected a tensor for noise_coef {noise_coef:g}, got None")
    chosen = _loader.choose_backend("guidance_step", cond, backend, KERNELS)
    if chosen != "reference" and (cond.dtype == torch.float64) != (latents.dtype == torch.float64):
        if backend is not None:
            raise TypeError(
                f"guidance_step: backend {backend!r} takes float64 latents with a float64 model alone, got "
                f"{latents.dtype} latents with {cond.dtype}"
            )
        chosen = "reference"
    step = reference.guidance_step if chosen == "reference" else _loader.op("guidance_step", chosen)
    return step(
        latents,
        cond,
        uncond,
        grad,
        noise,
        float(guidance_scale),
        float(strength),
        relative,
        float(latents_coef),
        float(velocity_coef),
        float(noise_coef),
    )


def _check(latents: Tensor, cond: Tensor, uncond: Tensor | None, grad: Tensor | None, noise: Tensor | None) -> None:
    given = {"latents": latents, "cond": cond, "uncond": uncond, "grad": grad, "noise": noise}
    given = {name: t for name, t in given.items() if t is not None or name in ("latents", "cond")}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"guidance_step: {name}: expected a tensor, got {type(t).__name__}")
        if t.layout != torch.strided:
            raise TypeError(f"guidance_step: {name}: expected a strided (dense) tensor, got layout {t.layout}")
    if latents.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"guidance_step: latents: expected float32 or float64, got {latents.dtype}")
    if not cond.is_floating_point():
        raise TypeError(f"guidance_step: cond: expected a floating-point dtype, got {cond.dtype}")
    if latents.dim() == 0:
        raise ValueError("guidance_step: latents: expected shape [B, ...], got []")
    for name, t in given.items():
        like = "cond" if name == "uncond" else "latents"
        if name != "cond" and t.dtype != given[like].dtype:
            raise TypeError(f"guidance_step: {name}: expected the dtype of {like}, {given[like].dtype}, got {t.dtype}")
        if t.device != latents.device:
            raise ValueError(f"guidance_step: {name}: expected the device of latents, {latents.device}, got {t.device}")
        if t.shape != latents.shape:
            raise ValueError(
                f"guidance_step: {name}: expected the shape of latents, {shape_of(latents)}, got {shape_of(t)}"
            )
        if torch.is_grad_enabled() and t.requires_grad:
            raise ValueError(
                f"guidance_step: {name}: it requires grad, but the op has no gradient; expected a detached tensor or "
                "torch.no_grad()"
            )


def register(namespace: str) -> None:
    """Fake kernel (shapes only) of a namespace, and an autograd formula that refuses."""

    @torch.library.register_fake(f"{namespace}::guidance_step")
    def _(latents, cond, uncond, grad, noise, guidance_scale, strength, relative, *coefs):
        return latents.new_empty(latents.shape), latents.new_empty(latents.shape[0], 2)

    def no_gradient(ctx, *grads):
        raise RuntimeError("guidance_step: it has no gradient; call it under torch.no_grad()")

    torch.library.register_autograd(f"{namespace}::guidance_step", no_gradient)


if _loader.HAS_OPS:
    register(_loader.NAMESPACE)
