"""Which models are distilled to few steps: their output is no posterior mean, which a value's reading rests on.

A value is trained on ``z_t = (1-t) z_0 + t eps`` with the clean reward as target, and its gradient tilts a velocity
taken as ``E[eps - z_0 | z_t]`` (METHOD.md §1). Few-step students (adversarial, consistency, distribution matching)
give a sample rather than that mean. Guidance distillation (FLUX.1 [dev], FLUX.2 [dev]) is another matter: the velocity
is the one that classifier-free guidance gives, and is used as such.
"""

from __future__ import annotations

import re
import warnings
import weakref

from torch import nn

# Schedulers that serve students alone.
FEW_STEP_SCHEDULERS = frozenset(
    {
        "CMStochasticIterativeScheduler",
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeliosDMDScheduler",
        "LCMScheduler",
        "PiflowScheduler",
        "SCMScheduler",
        "TCDScheduler",
    }
)
# Words in the names of checkpoints and of adapters.
FEW_STEP_WORDS = frozenset(
    {"causvid", "dmd", "dmd2", "distilled", "fastwan", "flash", "hyper", "lcm", "lightning", "lightx2v", "schnell",
     "sprint", "tcd", "turbo"}
)  # fmt: skip
# What the configurations of students have, by the class of the denoiser.
FEW_STEP_CONFIG = {
    "FluxTransformer2DModel": ("guidance_embeds", False, "FLUX.1 [schnell]"),
    "HunyuanImageTransformer2DModel": ("use_meanflow", True, "HunyuanImage distilled by mean flow"),
    "SanaTransformer2DModel": ("guidance_embeds", True, "SANA-Sprint"),
}

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def few_step_reason(pipe, denoiser: nn.Module) -> str | None:
    """Why a pipeline's denoiser is taken for a few-step student, in words; None if nothing says so.

    Looked at: the denoiser's configuration, the pipeline's own ``is_distilled``, the scheduler's class, and the names
    under which the pipeline, the denoiser and its adapters were loaded.
    """
    config, pipe_config = getattr(denoiser, "config", {}), getattr(pipe, "config", {})
    name, value, model = FEW_STEP_CONFIG.get(type(denoiser).__name__, (None, None, None))
    if name is not None and config.get(name, False) == value:
        return f"{name}={value} in its configuration, as {model} has it"
    if config.get("time_cond_proj_dim") is not None:
        return "time_cond_proj_dim in its configuration, as latent consistency models have it"
    if pipe_config.get("is_distilled"):
        return "is_distilled in the pipeline's configuration"
    scheduler = type(getattr(pipe, "scheduler", None)).__name__
    if scheduler in FEW_STEP_SCHEDULERS:
        return f"the scheduler {scheduler}"
    names = [c.get("_name_or_path") for c in (pipe_config, config)] + list(getattr(denoiser, "peft_config", {}))
    for name in filter(None, names):
        words = FEW_STEP_WORDS.intersection(_words(str(name)))
        if words:
            return f"{min(words)!r} in its name, {name}"
    return None


def warn_if_few_step(pipe, denoiser: nn.Module, stacklevel: int = 3) -> None:
    """Warn, once per denoiser, that a value on it has no sound reading."""
    if denoiser in _warned:
        return
    reason = few_step_reason(pipe, denoiser)
    if reason is None:
        return
    _warned.add(denoiser)
    warnings.warn(
        f"pipe: {type(denoiser).__name__} looks like a model distilled to few steps ({reason}). Its output is no "
        "posterior mean, so values and their gradients are not what the method says; use the model that it was "
        "distilled from",
        stacklevel=stacklevel,
    )


def _words(path: str) -> list[str]:
    """Lower-case words of a checkpoint's own name: the last part of a path or hub name, or the repository's in the
    hub's cache. Folders above it say nothing.
    """
    parts = [part for part in re.split(r"[/\\]", path) if part]
    cached = [part.rsplit("--", 1)[-1] for part in parts if part.startswith("models--")]
    return re.split(r"[^a-z0-9]+", " ".join([*cached, *parts[-1:]]).lower())
