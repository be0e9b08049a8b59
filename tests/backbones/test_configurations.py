"""The published sizes: adapters, cuts and shells hold at full size, on the meta device."""

from __future__ import annotations

import pytest

from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.backbones.configurations import CONFIGURATIONS
from stitchvm_ext.backbones.truncate import BLOCK_LISTS, blocks_of

# Billions as the models' authors or cards give them.
PUBLISHED = {
    "stable-diffusion-3.5-medium": "2.243",
    "stable-diffusion-3.5-large": "8.057",
    "FLUX.1-dev": "11.90",
    "FLUX.2-dev": "32",
    "HunyuanImage-2.1": "17",
    "Qwen-Image": "20.43",
}


def count(modules) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_published_size_and_shells_of_it(name):
    configuration = CONFIGURATIONS[name]
    denoiser = configuration.build()
    assert count([denoiser]) == configuration.parameters
    digits = len(PUBLISHED[name].partition(".")[2])
    assert f"{configuration.parameters / 1e9:.{digits}f}" == PUBLISHED[name]

    blocks = blocks_of(denoiser)
    first_list = len(denoiser.transformer_blocks)  # SD3 and Qwen-Image have no other
    own = {id(p) for p in denoiser.parameters()}
    for depth in {1, 4, first_list, min(first_list + 2, len(blocks))}:
        shell = backbone_of(denoiser).truncated(depth)
        kept = [block for blocks in BLOCK_LISTS for block in shell._modules.get(blocks, [])]
        assert kept == blocks[:depth]
        assert {id(p) for p in shell.parameters()} < own or depth == len(blocks)
        assert count([shell]) == configuration.parameters - count(blocks[depth:])
    assert blocks_of(denoiser) == blocks


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_adapter_reads_the_published_sizes(name):
    backbone = backbone_of(CONFIGURATIONS[name].build())
    channels, side, tokens, width = {
        "stable-diffusion-3.5-medium": (16, 128, 64, 1536),
        "stable-diffusion-3.5-large": (16, 128, 64, 2432),
        "FLUX.1-dev": (16, 128, 64, 3072),
        "FLUX.2-dev": (128, 64, 64, 6144),
        "HunyuanImage-2.1": (64, 64, 64, 3584),  # of 2048 pixels
        "Qwen-Image": (16, 128, 64, 3072),
    }[name]
    assert backbone.latent_channels == channels
    assert backbone.grid((side, side)) == (tokens, tokens)
    assert {backbone.width(1), backbone.width(backbone.depth)} == {width}
