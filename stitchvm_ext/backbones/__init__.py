"""Adapters of diffusion backbones, found by the class of the transformer."""

from __future__ import annotations

from .base import DiffusionBackbone
from .condition import Condition, Encoding, expand_rows, is_same_encoding
from .conditioning import ConditioningTable, precompute_conditioning
from .sd3 import SD3Backbone

REGISTRY: dict[str, type[DiffusionBackbone]] = {"SD3Transformer2DModel": SD3Backbone}
"""Adapter by the transformer's class name. A new backbone is one small class and one line here."""


def backbone_of(pipe_or_transformer) -> DiffusionBackbone:
    """The adapter of a pipeline's (or a bare) transformer. It holds a reference to the weights, never a copy.

    Raises:
        TypeError: no adapter is known for this class.
    """
    transformer = getattr(pipe_or_transformer, "transformer", pipe_or_transformer)
    name = type(transformer).__name__
    if name not in REGISTRY:
        raise TypeError(
            f"backbone: expected a pipeline or transformer of one of the classes {sorted(REGISTRY)}, got {name}; "
            "an adapter is a subclass of stitchvm_ext.backbones.DiffusionBackbone entered in its REGISTRY"
        )
    return REGISTRY[name](transformer)


__all__ = [
    "Condition",
    "ConditioningTable",
    "DiffusionBackbone",
    "Encoding",
    "REGISTRY",
    "SD3Backbone",
    "backbone_of",
    "expand_rows",
    "is_same_encoding",
    "precompute_conditioning",
]
