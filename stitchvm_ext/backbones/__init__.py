"""Adapters of diffusion backbones, found by the class of the transformer."""

from __future__ import annotations

from .base import DiffusionBackbone
from .condition import Condition, Encoding, expand_rows, is_same_encoding, stack_rows
from .conditioning import ConditioningTable, precompute_conditioning
from .ddpm import DDPMBackbone
from .flux import FluxBackbone
from .flux2 import Flux2Backbone
from .hunyuan_dit import HunyuanDiTBackbone
from .hunyuan_image import HunyuanImageBackbone
from .hunyuan_video import HunyuanVideoBackbone
from .lumina2 import Lumina2Backbone
from .pixart import PixArtBackbone
from .process import DDPM, ForwardProcess, RectifiedFlow, ReversedFlow, expand_sigma
from .qwen_image import QwenImageBackbone
from .sana import SanaBackbone
from .sd3 import SD3Backbone
from .unet import UNetBackbone
from .wan import WanBackbone

REGISTRY: dict[str, type[DiffusionBackbone]] = {
    "Flux2Transformer2DModel": Flux2Backbone,
    "FluxTransformer2DModel": FluxBackbone,
    "HunyuanDiT2DModel": HunyuanDiTBackbone,
    "HunyuanImageTransformer2DModel": HunyuanImageBackbone,
    "HunyuanVideoTransformer3DModel": HunyuanVideoBackbone,
    "Lumina2Transformer2DModel": Lumina2Backbone,
    "PixArtTransformer2DModel": PixArtBackbone,
    "QwenImageTransformer2DModel": QwenImageBackbone,
    "SD3Transformer2DModel": SD3Backbone,
    "SanaTransformer2DModel": SanaBackbone,
    "UNet2DConditionModel": UNetBackbone,
    "WanTransformer3DModel": WanBackbone,
}
"""Adapter by the class name of the transformer or U-Net. A new backbone is one small class and one line here."""


def backbone_of(pipe_or_denoiser) -> DiffusionBackbone:
    """The adapter of a pipeline's (or a bare) transformer or U-Net. It holds a reference to the weights, never a copy.

    Raises:
        TypeError: no adapter is known for this class.
        ValueError: a bare U-Net, or another model whose forward process is written in its pipeline's scheduler.
    """
    denoiser = pipe_or_denoiser
    for name in ("transformer", "unet"):
        denoiser = getattr(denoiser, name, None) or denoiser
    name = type(denoiser).__name__
    if name not in REGISTRY:
        raise TypeError(
            f"backbone: expected a pipeline, transformer or U-Net of one of the classes {sorted(REGISTRY)}, "
            f"got {name}; an adapter is a subclass of stitchvm_ext.backbones.DiffusionBackbone entered in its REGISTRY "
            '(CONTRIBUTING.md, "Adding a backbone")'
        )
    return REGISTRY[name].from_pipe(pipe_or_denoiser, denoiser)


__all__ = [
    "Condition",
    "ConditioningTable",
    "DDPM",
    "DDPMBackbone",
    "DiffusionBackbone",
    "Encoding",
    "Flux2Backbone",
    "FluxBackbone",
    "ForwardProcess",
    "HunyuanDiTBackbone",
    "HunyuanImageBackbone",
    "HunyuanVideoBackbone",
    "Lumina2Backbone",
    "PixArtBackbone",
    "QwenImageBackbone",
    "REGISTRY",
    "RectifiedFlow",
    "ReversedFlow",
    "SD3Backbone",
    "SanaBackbone",
    "UNetBackbone",
    "WanBackbone",
    "backbone_of",
    "expand_rows",
    "expand_sigma",
    "is_same_encoding",
    "precompute_conditioning",
    "stack_rows",
]
