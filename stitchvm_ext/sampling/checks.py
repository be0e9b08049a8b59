"""Checks of arguments that both front ends share. Each names the argument, what was expected and what came."""

from __future__ import annotations

from ..backbones import DiffusionBackbone
from ..backbones.identity import check_latent_space, latent_space
from ..value import StitchedValue
from ..value.base import ValueEstimator


def as_prompts(name: str, prompt) -> list[str]:
    """A non-empty list of texts from a text or a list of texts."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"{name}: expected a text or a list of texts, got {type(prompt).__name__}")
    if not all(isinstance(p, str) for p in prompts):
        kinds = sorted({type(p).__name__ for p in prompts})
        raise TypeError(f"{name}: expected a text or a list of texts, got a {type(prompts).__name__} with {kinds}")
    if not prompts:
        raise ValueError(f"{name}: expected at least one text, got an empty list")
    return list(prompts)


def check_count(name: str, count) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: expected an integer, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")


def check_guidance_scale(scale) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"guidance_scale: expected a number, got {type(scale).__name__}")
    if not 0 <= scale < float("inf"):
        raise ValueError(f"guidance_scale: expected a finite number >= 0, got {scale}")


def check_value(value, pipe, backbone: DiffusionBackbone, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless this is None or an estimator that reads latents of this shape."""
    if value is None:
        return
    if not isinstance(value, ValueEstimator):
        raise TypeError(f"value: expected a ValueEstimator or None, got {type(value).__name__}")
    if value.backbone.denoiser is not backbone.denoiser:
        if not isinstance(value, StitchedValue):
            raise ValueError(
                "value: expected a StitchedValue, or an estimator on this pipeline's own denoiser, got "
                f"{type(value).__name__} on another {type(value.backbone.denoiser).__name__}"
            )
        if value.prompt_conditioned:
            raise ValueError("value: a prompt-conditioned value reads the text encoding of its own pipeline only")
        check_latent_space(value.latent_space, latent_space(backbone, pipe))
    if hasattr(value, "check_latent_size"):
        value.check_latent_size(shape[-2:])


Window = tuple[int | float, int | float | None]
"""A half-open range of steps: integers count steps, floats are shares of the schedule, an end of None is the last."""


def check_window(name: str, window) -> None:
    """Raises ValueError unless this is a window of some schedule."""
    if isinstance(window, tuple | list) and len(window) == 2:
        first, end = window
        if _is_place(first) and (end is None or (_is_place(end) and (type(first) is not type(end) or first < end))):
            return
    raise ValueError(
        f"{name}: expected (first, end), steps as integers >= 0 or shares of the schedule as floats in [0, 1], "
        f"first < end, end may be None; got {window!r}"
    )


def _is_place(x) -> bool:
    return not isinstance(x, bool) and (isinstance(x, int) and x >= 0 or isinstance(x, float) and 0 <= x <= 1)


def step_of(name: str, place: int | float, num_steps: int) -> int:
    """The step that an integer, or a share of the schedule, stands for. ValueError outside the schedule."""
    step = round(place * num_steps) if isinstance(place, float) else place
    if not _is_place(place) or step > num_steps:
        raise ValueError(f"{name}: expected a step among {num_steps}, got {place!r}")
    return step


def steps_of(name: str, window: Window, num_steps: int) -> range:
    """The steps of a window. ValueError for one that is outside the schedule or holds no step of it."""
    first, end = step_of(name, window[0], num_steps), num_steps
    if window[1] is not None:
        end = step_of(name, window[1], num_steps)
    if first >= end:
        raise ValueError(f"{name}: expected at least one of {num_steps} steps, got none in {window!r}")
    return range(first, end)
