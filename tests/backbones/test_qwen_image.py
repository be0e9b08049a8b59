"""What only Qwen-Image has: a template around the text, masks, and guidance that keeps the conditional norm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import QwenImagePipeline

from stitchvm_ext import guided_sample, search_stitch
from stitchvm_ext.backbones import Condition, backbone_of
from stitchvm_ext.backbones.packed import pack
from stitchvm_ext.value.stitching import untrained_value
from tests import tiny
from tests.tiny.qwen_image import tiny_qwen_image

PROMPTS = ["a small red circle", "a ring"]
OPTIONS = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_qwen_image()


@pytest.fixture
def generators():
    return lambda: [torch.Generator().manual_seed(s) for s in (5, 6)]


def test_packing_is_the_pipelines_own():
    latents = torch.randn(2, 4, 6, 10)
    assert torch.equal(pack(latents), QwenImagePipeline._pack_latents(latents, 2, 4, 6, 10))


def test_text_is_the_templates_without_its_head(pipe):
    encoding = backbone_of(pipe).encode_text(pipe, [*PROMPTS, ""])
    tail = len(pipe.tokenizer(pipe.prompt_template_encode.split("{}")[1]).input_ids)
    assert encoding["prompt_embeds_mask"].sum(1).tolist() == [4 + tail, 2 + tail, tail]
    short = backbone_of(pipe).encode_text(pipe, PROMPTS, max_sequence_length=3)
    assert short["prompt_embeds_mask"].shape == short["prompt_embeds"].shape[:2] == (2, 3)


@pytest.mark.parametrize("negative", ["", "three large green squares"])
def test_guidance_is_the_pipelines_own(pipe, generators, negative):
    expected = pipe(
        PROMPTS, negative_prompt=[negative] * 2, true_cfg_scale=5.0, generator=generators(), **OPTIONS
    ).images
    options = {"negative_prompt": negative, "guidance_scale": 5.0, "progress": False, **OPTIONS}
    ours = guided_sample(pipe, None, PROMPTS, generator=generators(), **options)
    torch.testing.assert_close(pack(ours.latents), expected, rtol=0, atol=5e-4)


def test_guidance_keeps_the_conditional_norm_of_each_token(pipe):
    cond, uncond = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = Condition(("", ""), {}, {}, 5.0, backbone_of(pipe).rescale_guidance)
    guided, plain = condition.guide(cond, uncond), replace(condition, rescale=None).guide(cond, uncond)
    torch.testing.assert_close(pack(guided).norm(dim=-1), pack(cond).norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(pack(guided), pack(plain), dim=-1), torch.ones(2, 16))
    assert pack(plain).norm(dim=-1).min() > 1.5 * pack(cond).norm(dim=-1).min()


def test_value_shares_the_unconditional_branch_and_tilts_the_samples(pipe, generators):
    backbone = backbone_of(pipe)
    null = backbone.null_condition(pipe)
    images = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latents = backbone.encode_images(pipe.vae, images)
    search = search_stitch(backbone, tiny.tiny_reward(), latents, images, null, layers=[1], progress=False)
    value = untrained_value(pipe, tiny.tiny_reward(), search, 2, 1, (8, 8), null, {})
    options = {"guidance_scale": 4.0, "strength": 0.3, "progress": False, **OPTIONS}
    sample = lambda v, **extra: guided_sample(  # noqa: E731
        pipe, v, PROMPTS, generator=generators(), **options, **extra
    )
    plain, guided = sample(None), sample(value)
    assert guided.evaluations.denoiser == plain.evaluations.denoiser == 2 * 2 * 3
    assert (guided.latents - plain.latents).abs().max() > 0.02
    # Euler's steps outside the fused one, and what they are made of.
    by_hand = sample(value, transition=lambda z, u, sigma, following, eps: z + (following - sigma) * u)
    torch.testing.assert_close(by_hand.latents, guided.latents, rtol=0, atol=5e-4)
    condition = Condition(
        tuple(PROMPTS), backbone.encode_text(pipe, PROMPTS), backbone.encode_text(pipe, ["", ""]), 4.0,
        backbone.rescale_guidance,
    )  # fmt: skip
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    velocity, scores, grad = value.denoise_with_value(z, 0.7, condition)
    with torch.no_grad():
        torch.testing.assert_close(velocity, backbone.guided_velocity(z, 0.7, condition), rtol=1e-3, atol=1e-4)
    separate, separate_grad = value.value_and_grad(z, 0.7, condition)
    torch.testing.assert_close(scores, separate, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, separate_grad, rtol=1e-3, atol=1e-5)
