"""Modulation tables: the same numbers, fewer weights, and clear refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from stitchvm_ext import backbone_of, fuse, precompute_conditioning, unfuse
from tests.tiny import tiny_transformer

SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def backbone():
    return backbone_of(tiny_transformer())


def encoding(rows=2):
    g = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(rows, 6, 64, generator=g),
        "pooled_prompt_embeds": torch.randn(rows, 64, generator=g),
    }


def latents():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_velocity_is_the_plain_one(backbone, fused):
    z, texts = latents(), encoding()
    expected = {sigma: backbone.velocity(z, sigma, texts) for sigma in SIGMAS[:-1]}
    if fused:
        fuse(backbone.denoiser)
    with precompute_conditioning(backbone, SIGMAS, texts["pooled_prompt_embeds"]) as table:
        for sigma in SIGMAS[:-1]:
            torch.testing.assert_close(backbone.velocity(z, sigma, texts), expected[sigma], **CLOSE)
        # samples of one batch at different noise levels, texts in another order
        swapped = {name: t.flip(0) for name, t in texts.items()}
        mixed = backbone.velocity(z.flip(0), torch.tensor([0.25, 0.75]), swapped)
        torch.testing.assert_close(mixed[0], expected[0.25][1], **CLOSE)
        torch.testing.assert_close(mixed[1], expected[0.75][0], **CLOSE)
        assert table.nbytes == sum(4 * 2 * 4 * layer.table.shape[1] for layer in table.tables)
    unfuse(backbone.denoiser)
    torch.testing.assert_close(backbone.velocity(z, 0.4, texts), backbone.velocity(z, 0.4, texts))


def test_features_and_their_gradient_use_the_table(backbone):
    z, texts = latents(), encoding()

    def gradient():
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(backbone.features(leaf, 0.5, texts, 2).square().sum(), leaf)[0]

    expected = gradient()
    shell = backbone.truncated(2)
    with precompute_conditioning(backbone, SIGMAS, texts["pooled_prompt_embeds"]):
        torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-5)
        assert backbone.truncated(2) is shell


@torch.no_grad()
def test_release_takes_the_weights_out_and_remove_puts_them_back(backbone):
    texts = encoding()
    before = {name: p.clone() for name, p in backbone.denoiser.state_dict().items()}
    table = precompute_conditioning(backbone, SIGMAS, texts["pooled_prompt_embeds"], release=True)
    left = sum(p.nbytes for p in backbone.denoiser.parameters())
    assert left + table.replaced_bytes == sum(p.nbytes for p in tiny_transformer().parameters())
    table.remove()
    table.remove()
    after = backbone.denoiser.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())


def test_what_is_not_in_the_table_is_refused(backbone):
    texts = encoding()
    with precompute_conditioning(backbone, SIGMAS, texts["pooled_prompt_embeds"]):
        with pytest.raises(ValueError, match="timestep: expected one of the 4 noise levels .* got sigma 0.4"):
            backbone.velocity(latents(), 0.4, texts)
        other = {**texts, "pooled_prompt_embeds": texts["pooled_prompt_embeds"] + 1}
        with pytest.raises(ValueError, match="pooled_projections: expected one of the 2 pooled embeddings"):
            backbone.velocity(latents(), 0.5, other)
        with pytest.raises(ValueError, match="reads a modulation table already"):
            precompute_conditioning(backbone, SIGMAS, texts["pooled_prompt_embeds"])
    backbone.velocity(latents(), 0.4, other)


@pytest.mark.parametrize(
    ("sigmas", "pooled", "error", "message"),
    [
        ([], torch.zeros(1, 64), ValueError, r"sigmas: expected noise levels in \(0, 1\]"),
        ([1.5], torch.zeros(1, 64), ValueError, r"sigmas: expected noise levels in \(0, 1\]"),
        ([0.5], torch.zeros(1, 63), ValueError, r"pooled_prompt_embeds: expected shape \[P, 64\], got"),
        ([0.5], [0.0] * 64, ValueError, r"pooled_prompt_embeds: expected shape \[P, 64\], got list"),
    ],
)
def test_bad_input(backbone, sigmas, pooled, error, message):
    with pytest.raises(error, match=message):
        precompute_conditioning(backbone, sigmas, pooled)


def test_an_offloaded_transformer_is_refused():
    backbone = backbone_of(copy.deepcopy(tiny_transformer()))
    backbone.denoiser.enable_group_offload("cpu", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="expected a transformer that stays on its device"):
        precompute_conditioning(backbone, SIGMAS, encoding()["pooled_prompt_embeds"])
