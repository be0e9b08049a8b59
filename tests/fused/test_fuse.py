"""A fused transformer: the same velocity, gradient and call counts; and back."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from stitchvm_ext import backbone_of, fuse, precompute_conditioning, unfuse
from stitchvm_ext.measure import count_evaluations
from tests.tiny import tiny_pipeline, tiny_transformer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def encoding(rows=2):
    g = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(rows, 6, 64, generator=g),
        "pooled_prompt_embeds": torch.randn(rows, 64, generator=g),
    }


def latents():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_velocity_and_back():
    transformer = tiny_transformer()
    backbone = backbone_of(transformer)
    expected = backbone.velocity(latents(), 0.5, encoding())
    assert fuse(transformer) == 4
    with count_evaluations(backbone) as evaluations:
        torch.testing.assert_close(backbone.velocity(latents(), 0.5, encoding()), expected, **CLOSE)
    assert evaluations.denoiser * len(backbone.blocks) == 8
    unfuse(transformer)
    unfuse(transformer)
    assert torch.equal(backbone.velocity(latents(), 0.5, encoding()), expected)
    assert not any("forward" in block.__dict__ for block in transformer.transformer_blocks)


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_gradient_through_the_whole_denoiser(memory):
    """What Tweedie guidance needs."""
    transformer = tiny_transformer()
    backbone = backbone_of(transformer)

    def gradient():
        leaf = latents().requires_grad_()
        return torch.autograd.grad(backbone.velocity(leaf, 0.5, encoding()).square().sum(), leaf)[0]

    expected = gradient()
    fuse(transformer, memory=memory)
    torch.testing.assert_close(gradient(), expected, **CLOSE)


def test_a_transformer_made_in_inference_mode():
    """Its weights have no version counter, and may still run fused without gradients."""
    with torch.inference_mode():
        transformer = tiny_transformer()
        backbone = backbone_of(transformer)
        expected = backbone.velocity(latents(), 0.5, encoding())
        assert fuse(transformer) == 4
        torch.testing.assert_close(backbone.velocity(latents(), 0.5, encoding()), expected, **CLOSE)


def test_attention_arguments_take_the_plain_path():
    transformer = tiny_transformer()
    block = transformer.transformer_blocks[0]
    fuse(transformer)
    args = torch.randn(1, 4, 32), torch.randn(1, 3, 32), torch.randn(1, 32)
    torch.testing.assert_close(block(*args, joint_attention_kwargs={"scale": 1.0}), block(*args), **CLOSE)


def test_the_pipeline_runs_fused():
    pipe = tiny_pipeline()
    call = {"prompt": "a red circle", "num_inference_steps": 3, "output_type": "latent"}
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    fuse(pipe.transformer)
    try:
        got = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    finally:
        unfuse(pipe.transformer)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_bad_input():
    with pytest.raises(ValueError, match="expected JointTransformerBlocks .* got Linear"):
        fuse(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="memory: expected one of"):
        fuse(tiny_transformer(), memory="none")


def test_a_graph_is_left_out_where_it_cannot_be():
    """On the CPU, and with gradients, the pass runs as it is."""
    transformer = tiny_transformer()
    backbone = backbone_of(transformer)
    expected = backbone.velocity(latents(), 0.5, encoding())
    fuse(transformer, cuda_graph=True)
    torch.testing.assert_close(backbone.velocity(latents(), 0.5, encoding()), expected, **CLOSE)
    unfuse(transformer)
    assert "forward" not in transformer.__dict__


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("table", [False, True])
@torch.no_grad()
def test_a_graph_gives_the_same_velocity_and_is_counted(table):
    transformer = tiny_transformer().cuda()
    backbone = backbone_of(transformer)
    texts = {name: t.cuda() for name, t in encoding().items()}
    z = latents().cuda()
    expected = {sigma: backbone.velocity(z, sigma, texts) for sigma in (0.75, 0.5)}
    fuse(transformer, cuda_graph=True)
    tables = precompute_conditioning(backbone, [0.75, 0.5], texts["pooled_prompt_embeds"]) if table else nullcontext()
    with tables:
        backbone.velocity(z + 1, 0.5, texts)  # captures
        with count_evaluations(backbone) as evaluations:
            for sigma, velocity in expected.items():
                torch.testing.assert_close(backbone.velocity(z, sigma, texts), velocity, rtol=1e-3, atol=1e-4)
    assert evaluations.denoiser * len(backbone.blocks) == 2 * 2 * 4
