"""The fused vision transformer block against open_clip's own."""

from __future__ import annotations

import pytest
import torch

from stitchvm_ext.fused.vit_block import is_vit_block, vit_block

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def make_block(act="gelu", layer_scale=None):
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock

    torch.manual_seed(0)
    act_layer = QuickGELU if act == "quick_gelu" else torch.nn.GELU
    block = ResidualAttentionBlock(32, 4, ls_init_value=layer_scale, act_layer=act_layer)
    block = block.eval().requires_grad_(False).double()
    for p in block.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return block


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_values_and_gradient(act, layer_scale, memory):
    block = make_block(act, layer_scale)
    tokens = torch.randn(2, 17, 32, dtype=torch.float64).requires_grad_()
    assert is_vit_block(block, tokens)
    expected, got = block(tokens), vit_block(block, tokens, memory)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    torch.testing.assert_close(vit_block(block, tokens.detach()), expected.detach(), **TOLERANCE)
    (expected,) = torch.autograd.grad(expected, tokens, grad)
    (got,) = torch.autograd.grad(got, tokens, grad)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_only_the_tokens_that_are_read(memory):
    block, rows = make_block("quick_gelu", 0.3), torch.tensor([0, 5])
    tokens = torch.randn(2, 17, 32, dtype=torch.float64).requires_grad_()
    expected, got = block(tokens)[:, rows], vit_block(block, tokens, memory, rows)[:, rows]
    torch.testing.assert_close(got, expected, **TOLERANCE)
    (expected,) = torch.autograd.grad(expected.square().sum(), tokens)
    (got,) = torch.autograd.grad(got.square().sum(), tokens)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("what", ["trained", "hook", "adapter", "activation", "autocast"])
def test_a_block_with_other_parts_is_left_alone(what):
    block, tokens = make_block(), torch.randn(1, 3, 32)
    if what == "trained":
        block.mlp.c_fc.weight.requires_grad_(True)
    elif what == "hook":
        block.forward = lambda tokens: tokens
    elif what == "adapter":
        block.mlp.c_fc = torch.nn.Sequential(block.mlp.c_fc)
    elif what == "activation":
        block.mlp.gelu = torch.nn.ReLU()
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        assert not is_vit_block(block, tokens)


def test_second_derivative_raises_with_advice():
    tokens = torch.randn(1, 3, 32, dtype=torch.float64).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(vit_block(make_block(), tokens).sum(), tokens, create_graph=True)
