"""What tells a run of prompts from another, JSON-ready: so that none goes on with another's files."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from torch import nn

from ..backbones import backbone_of
from ..rewards.sum import WeightedSum
from ..value.base import ValueEstimator
from ..value.targets import denoiser_identity, text_encoders_identity, vae_identity, weights_hash
from .schedule import pipeline_sigmas


def pipe_identity(pipe) -> dict[str, Any]:
    """What tells a pipeline from another."""
    return {
        "class": type(pipe).__name__,
        "denoiser": denoiser_identity(backbone_of(pipe).denoiser),
        "vae": vae_identity(pipe.vae)["weights"],
        "text_encoders": text_encoders_identity(pipe),
    }


def call_identity(pipe, value: ValueEstimator | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """What tells a call of :func:`guided_sample` from another, of all its ``arguments``."""
    backbone = backbone_of(pipe)
    size = backbone.latent_size(pipe, arguments["height"], arguments["width"])
    return {
        **arguments,
        "reward": identity(arguments["reward"]),
        "sigmas": pipeline_sigmas(pipe, backbone, arguments["num_inference_steps"], size).tolist(),
        "value": identity(value),
    }


def identity(x) -> Any:
    """What tells a value or a reward from another, JSON-ready: classes, numbers and a digest of weights."""
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, list | tuple):
        return [identity(entry) for entry in x]
    if isinstance(x, WeightedSum):
        return {"weights": x.weights, "normalise": x.normalise}
    found: dict[str, Any] = {"class": type(x).__name__}
    if isinstance(x, nn.Module):
        found["weights"] = weights_hash(x)
    for name, entry in vars(x).items():
        if name.startswith("_") or name in ("backbone", "vae", "training", "details"):
            continue
        known = bool | int | float | str | WeightedSum
        if isinstance(entry, known if isinstance(x, nn.Module) else known | ValueEstimator | nn.Module | list | tuple):
            found[name] = identity(entry)
    return found


def plain(x) -> Any:
    """JSON of what has none of its own: options by their fields, functions by name."""
    if is_dataclass(x):
        return vars(x)
    if callable(x):
        return getattr(x, "__qualname__", type(x).__name__)
    raise TypeError(f"options: expected numbers, texts and functions, got {type(x).__name__}")


def difference(theirs: Any, ours: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place at which two JSON documents differ, and what stands there."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in dict.fromkeys((*ours, *theirs)):
            found = difference(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    if isinstance(theirs, list) and isinstance(ours, list):
        for place, pair in enumerate(zip(theirs, ours, strict=False)):
            found = difference(*pair, f"{name}[{place}]")
            if found:
                return found
        return None if len(theirs) == len(ours) else (f"number of {name}", len(theirs), len(ours))
    return None if theirs == ours else (name, theirs, ours)
