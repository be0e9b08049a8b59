"""A whole value model on a small real SD3 model, latent to embedding: fused against plain autograd, to 1e-12."""

from __future__ import annotations

import copy

import pytest
import torch

from stitchvm_ext.backbones import backbone_of, precompute_conditioning
from stitchvm_ext.fused import fused_forward, joint_block
from stitchvm_ext.rewards import base as rewards_base
from stitchvm_ext.value import StitchedValue
from stitchvm_ext.value.stitch_layer import StitchLayer
from tests import tiny

LATENTS = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def value():
    """16x16 image tokens for 4x4 patches: the stitch reads a quarter of them."""
    pipe = tiny.tiny_pipeline()
    backbone = backbone_of(copy.deepcopy(pipe.transformer).double())
    suffix = tiny.tiny_reward().suffix(1)
    torch.manual_seed(0)
    stitch = StitchLayer(32, 32, (4, 4))
    torch.nn.init.normal_(stitch.mlp[3].weight, std=0.3)
    null = backbone_of(pipe).null_condition(pipe, max_sequence_length=0)
    value = StitchedValue(
        backbone, stitch, suffix, depth=3, layer=1, latent_size=(32, 32), null_condition=null, text_options={}
    )
    return value.double().requires_grad_(False)


def embedding_and_gradient(value, pooled_only=True):
    leaf = LATENTS.clone().requires_grad_()
    embedding = value(value.tokens(leaf, 0.6), pooled_only).embedding
    weights = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return embedding, torch.autograd.grad((embedding * weights).sum(), leaf)[0]


def plain(monkeypatch):
    """diffusers' and open_clip's own blocks."""
    monkeypatch.setattr(fused_forward, "is_joint_block", lambda block: False)
    monkeypatch.setattr(rewards_base, "is_vit_block", lambda block, tokens: False)


@pytest.mark.usefixtures("exact_rms_norm")
def test_value_and_gradient_equal_plain_autograd(value, monkeypatch):
    assert len(value.read_tokens) == 64
    fused = {}
    for memory in ("save", "recompute"):
        value.memory = memory
        fused[memory] = embedding_and_gradient(value)
    whole = embedding_and_gradient(value, pooled_only=False)
    plain(monkeypatch)
    expected = embedding_and_gradient(value)
    for got in (*fused.values(), whole):
        torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.usefixtures("exact_rms_norm")
def test_the_table_changes_nothing(value):
    expected = embedding_and_gradient(value)
    with precompute_conditioning(value.backbone, [0.9, 0.6], value.null_condition["pooled_prompt_embeds"]):
        got = embedding_and_gradient(value)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_fused_is_what_runs(value, monkeypatch):
    """The tests above would pass if nothing were fused."""
    calls = []
    forward = joint_block.forward
    monkeypatch.setattr(joint_block, "forward", lambda *args: calls.append(args[4]) or forward(*args))
    embedding_and_gradient(value)
    assert [want.prune for want in calls] == [False, False, True]
    assert torch.equal(calls[-1].rows, value.read_tokens)
