"""What only FLUX has: packing, guidance as an input, and no unconditional branch."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from stitchvm_ext import StitchedValue, apply_value_guidance, guided_sample, remove_value_guidance, search_stitch
from stitchvm_ext.backbones import Condition, backbone_of
from stitchvm_ext.backbones.packed import pack, unpack
from stitchvm_ext.value import ValueEstimator
from stitchvm_ext.value.stitching import untrained_value
from tests import tiny
from tests.tiny.flux import tiny_flux

PROMPTS = ["a small red circle", "two blue squares"]
LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def test_packing_is_the_pipelines_own():
    latents = torch.randn(2, 4, 6, 10)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpack(tokens, (3, 5)), latents)
    with pytest.raises(ValueError, match="multiples of 2"):
        pack(latents[..., :9])


def test_dev_reads_the_guidance_scale_and_schnell_does_not():
    for guidance_embeds in (True, False):
        pipe = tiny_flux(guidance_embeds=guidance_embeds)
        backbone = backbone_of(pipe)
        low, high = (backbone.encode_text(pipe, PROMPTS, guidance=g) for g in (1.0, 7.0))
        with torch.no_grad():
            same = torch.equal(*(backbone.velocity(LATENTS, 0.5, encoding) for encoding in (low, high)))
        assert same != guidance_embeds


@pytest.fixture(scope="module")
def make_value():
    pipe = tiny_flux()
    backbone = backbone_of(pipe)
    options = {"max_sequence_length": 12}
    null = backbone.null_condition(pipe, **options)
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = backbone.encode_images(pipe.vae, images)
    search = search_stitch(backbone, tiny.tiny_reward(), latents, images, null, layers=[1], progress=False)

    def make(depth: int, prompt_conditioned: bool) -> StitchedValue:
        value = untrained_value(pipe, tiny.tiny_reward(), search, depth, 1, (16, 16), null, options)
        value.prompt_conditioned = prompt_conditioned
        return value

    return make


@pytest.mark.parametrize("prompt_conditioned", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_hook_inside_the_pipelines_call_is_guided_sample(make_value, depth, prompt_conditioned):
    pipe, value = tiny_flux(), make_value(depth, prompt_conditioned)
    generators = lambda: [torch.Generator().manual_seed(s) for s in (5, 6)]  # noqa: E731
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 12, "output_type": "latent"}
    call = lambda: pipe(PROMPTS, generator=generators(), **options).images  # noqa: E731
    plain = call()
    guide = apply_value_guidance(pipe.transformer, value, PROMPTS, guidance_scale=4.0, strength=0.3)
    hooked = call()
    remove_value_guidance(pipe.transformer)
    assert torch.equal(call(), plain)
    ours = guided_sample(pipe, value, PROMPTS, generator=generators(), strength=0.3, progress=False, **options)
    torch.testing.assert_close(unpack(hooked, (8, 8)), ours.latents, rtol=0, atol=5e-4)
    assert (hooked - plain).abs().max() > 0.02
    torch.testing.assert_close(torch.stack([v for _, v in guide.values]), ours.values, rtol=1e-3, atol=1e-4)
    # A prompt-conditioned value shares the only branch that there is; the null text needs a prefix of its own.
    extra = 0 if prompt_conditioned else 2 * 3 * depth / 4
    assert ours.evaluations.denoiser == pytest.approx(2 * 3 + extra)


def test_hook_refuses_two_passes_a_step(make_value):
    pipe = tiny_flux()
    options = {"num_inference_steps": 2, "max_sequence_length": 12, "output_type": "latent"}
    apply_value_guidance(pipe.transformer, make_value(1, False), PROMPTS, guidance_scale=3.5)
    try:
        with pytest.raises(ValueError, match="true_cfg_scale: expected one call of the transformer for each step"):
            pipe(PROMPTS, true_cfg_scale=2.0, negative_prompt=["", ""], **options)
        pipe(PROMPTS, **options)
    finally:
        remove_value_guidance(pipe.transformer)


def test_prompt_conditioned_prefix_serves_both(make_value):
    value = make_value(2, True)
    encoding = value.backbone.encode_text(tiny_flux(), PROMPTS, max_sequence_length=12)
    condition = Condition(tuple(PROMPTS), encoding)
    assert value.can_share(condition)
    shared = value.branches_with_value(LATENTS, 0.6, condition)
    separate = ValueEstimator.branches_with_value(value, LATENTS, 0.6, condition)
    assert shared[1] is None and separate[1] is None
    for k in (0, 2, 3):
        torch.testing.assert_close(shared[k], separate[k], rtol=1e-4, atol=1e-6)
    null_value, null_grad = make_value(2, False).value_and_grad(LATENTS, 0.6, condition)
    assert not torch.allclose(null_value, shared[2], atol=1e-5)


@pytest.mark.parametrize("negative", ["", "three green squares"])
def test_true_cfg_is_the_pipelines_own(negative):
    pipe = tiny_flux()
    generators = lambda: [torch.Generator().manual_seed(s) for s in (5, 6)]  # noqa: E731
    options = {
        "num_inference_steps": 3, "guidance_scale": 2.0, "true_cfg_scale": 3.0, "negative_prompt": [negative] * 2,
        "max_sequence_length": 12, "output_type": "latent",
    }  # fmt: skip
    expected = pipe(PROMPTS, generator=generators(), **options).images
    ours = guided_sample(pipe, None, PROMPTS, generator=generators(), progress=False, **options)
    torch.testing.assert_close(pack(ours.latents), expected, rtol=0, atol=5e-4)
    plain = guided_sample(
        pipe, None, PROMPTS, generator=generators(), progress=False, **options | {"true_cfg_scale": 1}
    )
    assert (plain.latents - ours.latents).abs().max() > 0.02
