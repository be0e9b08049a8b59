"""Shapes of real models, by the name that users know. Sizes from the models' published configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backbone:
    """A diffusion transformer: ``tokens`` image tokens at 1024², ``text`` text tokens, ``blocks`` in all."""

    width: int
    heads: int
    blocks: int
    dual_attention: int  # blocks with a second, image-only attention, from the first on
    text: int
    tokens: int = 4096
    rotary: bool = False


@dataclass(frozen=True)
class Tower:
    """An image tower: ``side``² patches of ``patch`` pixels and one class token."""

    width: int
    heads: int
    layers: int
    patch: int
    side: int
    embed: int
    mlp_ratio: float = 4.0
    quick_gelu: bool = False


BACKBONES = {
    "sd3.5-medium": Backbone(width=1536, heads=24, blocks=24, dual_attention=13, text=333),
    "sd3.5-large": Backbone(width=2432, heads=38, blocks=38, dual_attention=0, text=333),
    "flux.1-dev": Backbone(width=3072, heads=24, blocks=57, dual_attention=0, text=512, rotary=True),
}

TOWERS = {
    "vit-l-14-336": Tower(width=1024, heads=16, layers=24, patch=14, side=24, embed=768, quick_gelu=True),
    "vit-h-14": Tower(width=1280, heads=16, layers=32, patch=14, side=16, embed=1024),
}
