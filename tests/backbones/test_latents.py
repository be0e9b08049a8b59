"""Images to latents and back in half precision."""

from __future__ import annotations

import copy

import torch

from stitchvm_ext.backbones.latents import decode_latents, encode_images
from tests.tiny import tiny_autoencoder


def test_an_autoencoder_that_overflows_in_float16_runs_in_float32():
    """As SDXL's pipeline does where the configuration says ``force_upcast``; the weights themselves stay float16."""
    half = copy.deepcopy(tiny_autoencoder()).half()
    assert half.config.force_upcast
    full = copy.deepcopy(half).float()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    z = encode_images(half, images)
    assert torch.equal(z, encode_images(full, images))
    leaf, same = z.clone().requires_grad_(), z.clone().requires_grad_()
    decoded, expected = decode_latents(half, leaf), decode_latents(full, same)
    assert torch.equal(decoded, expected)
    decoded.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(leaf.grad, same.grad)
    assert {p.dtype for p in half.parameters()} == {torch.float16}

    half.register_to_config(force_upcast=False)
    assert not torch.equal(decode_latents(half, z), decoded)
