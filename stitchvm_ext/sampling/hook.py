"""Value guidance inside an unchanged pipeline call, as a diffusers ``ModelHook`` on the transformer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Condition, Encoding
from ..backbones.base import frozen
from ..value import ValueEstimator
from .checks import as_prompts, check_guidance_scale
from .guidance import Guidance, check_finite

HOOK_NAME = "stitchvm_value_guidance"


def apply_value_guidance(
    transformer: nn.Module,
    value: ValueEstimator,
    prompts: str | list[str],
    *,
    guidance_scale: float = 7.0,
    strength: float = Guidance.strength,
    mode: str = Guidance.mode,
    schedule: str | Callable[[float], float] = Guidance.schedule,
    window: tuple[int, int | None] = Guidance.window,
    every: int = Guidance.every,
) -> ValueGuide:
    """Guide every following call of the pipeline that owns ``transformer``, until :func:`remove_value_guidance`.

    The hook subtracts ``c_t grad V`` from both halves of the pipeline's [unconditional, conditional] batch, so that
    the guided velocity ``u + s (c - u)`` loses exactly ``c_t grad V`` whatever s is; with the pipeline's Euler
    scheduler this is :func:`guided_sample` with ``transition="ode"``. Where the first half is the value's null text,
    its pass through the transformer serves the value too. Steps are counted by the noise level: one that rises starts
    a new trajectory.

    Args:
        transformer: ``pipe.transformer``.
        value: an estimator on this transformer.
        prompts: the texts that the pipeline will be called with, which the reward scores against.
            ``num_images_per_prompt`` is read off the batch.
        guidance_scale: the one that the pipeline will be called with. It decides whether a batch holds two halves, and
            the relative strength is measured against the velocity that it gives. A pipeline with distilled guidance
            (FLUX) has one half; its ``true_cfg_scale``, which makes two calls of a step, is refused.
        strength, mode, schedule, window, every: see :class:`~stitchvm_ext.sampling.Guidance`.

    Returns:
        the guide, whose ``values`` holds (sigma, V [B]) of the guided steps of the latest trajectory.

    Raises:
        TypeError, ValueError: bad input, or the transformer is guided already. A pipeline's call that does not fit
            raises from within.
    """
    from diffusers.hooks import HookRegistry, ModelHook

    guide = ValueGuide(transformer, value, prompts, guidance_scale, Guidance(strength, mode, schedule, window, every))
    if is_guided(transformer):
        raise ValueError("transformer: it is guided already; call remove_value_guidance(transformer) first")

    class ValueGuidanceHook(ModelHook):  # here, so that importing this package does not import diffusers
        def new_forward(self, module, *args, **kwargs):
            return guide(self.fn_ref.original_forward, *args, **kwargs)

    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(ValueGuidanceHook(), HOOK_NAME)
    return guide


def remove_value_guidance(transformer: nn.Module) -> None:
    """Take the guidance off again: the pipeline computes what it did before. Does nothing where there is none."""
    if is_guided(transformer):
        transformer._diffusers_hook.remove_hook(HOOK_NAME, recurse=False)


def is_guided(transformer: nn.Module) -> bool:
    """Whether :func:`apply_value_guidance` is in force."""
    registry = getattr(transformer, "_diffusers_hook", None)
    return registry is not None and registry.get_hook(HOOK_NAME) is not None


class ValueGuide:
    """Stands in for a transformer's forward: the same velocity, less ``c_t grad V``.

    Attributes:
        values: (sigma, V float32 [B]) of the guided steps of the latest trajectory.
    """

    def __init__(
        self, transformer: nn.Module, value: ValueEstimator, prompts, guidance_scale: float, guidance: Guidance
    ):
        prompts = as_prompts("prompts", prompts)
        check_guidance_scale(guidance_scale)
        if not isinstance(value, ValueEstimator):
            raise TypeError(f"value: expected a ValueEstimator, got {type(value).__name__}")
        if value.backbone.denoiser is not transformer:
            raise ValueError("value: expected an estimator on this very transformer, got one on another")
        self.value, self.prompts = value, prompts
        self.guidance_scale, self.guidance = float(guidance_scale), guidance
        self.values: list[tuple[float, Tensor]] = []
        self._step, self._sigma = -1, float("inf")
        self._shares = False
        self._term: Tensor | None = None
        self._latents: Tensor | None = None  # of the latest call
        self._inside = False  # the estimator calls the same transformer

    def __call__(self, forward: Callable, *args, **kwargs):
        if self._inside:
            return forward(*args, **kwargs)
        self._inside = True
        try:
            call = inspect.signature(forward).bind(*args, **kwargs).arguments
            with frozen(self.value.backbone.denoiser):
                return self._guided(forward, call)
        finally:
            self._inside = False

    def _guided(self, forward: Callable, call: dict[str, Any]):
        latents, sigma, encoding, plain = self.value.backbone.read_inputs(call)
        if call.get("skip_layers") is not None:  # skip-layer guidance subtracts this output from the conditional one
            return _replace(
                forward(**call), lambda u: u if self._term is None else (u.float() - self._term).to(u.dtype)
            )
        backbone = self.value.backbone
        if backbone.distilled_guidance and self._step > 0 and sigma == self._sigma and latents.equal(self._latents):
            raise ValueError("true_cfg_scale: expected one call of the transformer for each step, got a second one")
        self._advance(sigma)
        self._term, self._latents = None, latents
        with_cfg = self.guidance_scale > 1 and not backbone.distilled_guidance
        if self._step == 0:
            self._check_batch(latents, encoding, with_cfg)
        if not self.guidance.is_active(self._step, sigma):
            return forward(**call)

        batch = len(latents) // 2 if with_cfg else len(latents)
        latents = latents[:batch]
        condition = self._condition(encoding, batch, with_cfg)
        if not self.values:  # the first guided step of a trajectory
            self._shares = plain and self.value.can_share(condition)
        if self._shares:
            cond, uncond, value, grad = self.value.shared_branches(latents, sigma, condition)
            output = (backbone.pack(cond if uncond is None else torch.cat([uncond, cond])),)
            if call.get("return_dict", True):
                from diffusers.models.modeling_outputs import Transformer2DModelOutput

                output = Transformer2DModelOutput(sample=output[0])
        else:
            output = forward(**call)
            value, grad = self.value.value_and_grad(latents, sigma, condition)
        both = backbone.unpack(output[0], latents)
        velocity = condition.guide(both[-batch:], both[:batch] if with_cfg else None)
        check_finite(self._step, sigma, velocity=velocity, value=value, gradient=grad)
        self.values.append((sigma, value))
        self._term = backbone.pack(self.guidance.term(velocity, grad, sigma))
        term = torch.cat([self._term] * 2) if with_cfg else self._term
        return _replace(output, lambda u: (u.float() - term).to(u.dtype))

    def _advance(self, sigma: float) -> None:
        """Count steps by the noise level: lower is the next step, higher a new trajectory, equal the same step."""
        if self._step < 0 or sigma > self._sigma:
            self._step, self.values = 0, []
        elif sigma < self._sigma:
            self._step += 1
        elif self._step == 0:
            self.values = []
        self._sigma = sigma

    def _check_batch(self, latents: Tensor, encoding: Encoding, with_cfg: bool) -> None:
        rows = len(latents)
        has_halves = rows % 2 == 0 and torch.equal(latents[: rows // 2], latents[rows // 2 :])
        if with_cfg and not has_halves:
            raise ValueError(
                f"guidance_scale: expected batches of [unconditional, conditional] halves for {self.guidance_scale:g}, "
                f"got {rows} different latents; was the pipeline called without classifier-free guidance?"
            )
        batch = rows // 2 if with_cfg else rows
        first_half = {name: t[: rows // 2] for name, t in encoding.items()}
        if has_halves and not with_cfg and self.value.is_null_text(first_half):
            raise ValueError(
                f"guidance_scale: expected no unconditional half for {self.guidance_scale:g}, got one; "
                "give the guidance_scale that the pipeline is called with"
            )
        if batch % len(self.prompts):
            raise ValueError(f"prompts: expected {len(self.prompts)} samples or a multiple of it, got {batch}")

    def _condition(self, encoding: Encoding, batch: int, with_cfg: bool) -> Condition:
        prompts = tuple(p for p in self.prompts for _ in range(batch // len(self.prompts)))
        cond = {name: t[-batch:] for name, t in encoding.items()}
        uncond = {name: t[:batch] for name, t in encoding.items()} if with_cfg else None
        return Condition(prompts, cond, uncond, self.guidance_scale if with_cfg else 1.0)


def _replace(output, change: Callable[[Tensor], Tensor]):
    """A transformer's output with its velocity changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    output.sample = change(output.sample)
    return output
