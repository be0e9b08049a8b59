"""What only FLUX.2 has: patched latents under a batch norm, positions of four numbers, single blocks on one tensor."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from stitchvm_ext import apply_value_guidance, guided_sample, remove_value_guidance, search_stitch
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.backbones.flux2 import position_ids
from stitchvm_ext.value.stitching import untrained_value
from tests import tiny
from tests.tiny.flux2 import tiny_flux2

PROMPTS = ["a small red circle", "two blue squares"]
LATENTS = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))
TEXT = {"max_sequence_length": 100}


def test_packing_and_positions_are_the_pipelines_own():
    backbone = backbone_of(tiny_flux2())
    latents = torch.randn(2, 16, 3, 5)
    tokens = backbone.pack(latents)
    assert torch.equal(tokens, Flux2Pipeline._pack_latents(latents))
    assert torch.equal(backbone.unpack(tokens, latents), latents)
    cpu = torch.device("cpu")
    assert torch.equal(position_ids(3, 5, 1, cpu), Flux2Pipeline._prepare_latent_ids(latents)[0])
    assert torch.equal(position_ids(1, 1, 7, cpu), Flux2Pipeline._prepare_text_ids(torch.zeros(1, 7, 2))[0])


def test_images_are_encoded_as_the_pipelines_reference_images():
    pipe = tiny_flux2()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = pipe._encode_vae_image(images * 2 - 1, None)
    torch.testing.assert_close(backbone_of(pipe).encode_images(pipe.vae, images), expected)


def test_noise_levels_depend_on_tokens_and_steps():
    pipe = tiny_flux2()
    options = backbone_of(pipe).timestep_options(pipe.scheduler.config, 5, (8, 12))
    assert options["mu"] == compute_empirical_mu(96, 5) != compute_empirical_mu(96, 50)
    assert options["sigmas"].tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_dev_reads_the_guidance_scale_and_klein_does_not():
    for klein in (False, True):
        pipe = tiny_flux2(klein)
        backbone = backbone_of(pipe)
        low, high = (backbone.encode_text(pipe, PROMPTS, guidance=g, **TEXT) for g in (1.0, 7.0))
        with torch.no_grad():
            same = torch.equal(*(backbone.velocity(LATENTS, 0.5, encoding) for encoding in (low, high)))
        assert same == klein


@pytest.fixture(scope="module")
def make_value():
    def make(pipe, depth: int, prompt_conditioned: bool = False):
        backbone = backbone_of(pipe)
        null = backbone.null_condition(pipe, **TEXT)
        images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        latents = backbone.encode_images(pipe.vae, images)
        search = search_stitch(backbone, tiny.tiny_reward(), latents, images, null, layers=[1], progress=False)
        value = untrained_value(pipe, tiny.tiny_reward(), search, depth, 1, (8, 8), null, TEXT)
        value.prompt_conditioned = prompt_conditioned
        return value

    return make


@pytest.mark.parametrize(("depth", "prompt_conditioned"), [(1, False), (3, True)])
def test_hook_inside_the_pipelines_call_is_guided_sample(make_value, depth, prompt_conditioned):
    pipe = tiny_flux2()
    value = make_value(pipe, depth, prompt_conditioned)
    generators = lambda: [torch.Generator().manual_seed(s) for s in (5, 6)]  # noqa: E731
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", **TEXT}
    call = lambda: pipe(prompt=PROMPTS, generator=generators(), **options).images  # noqa: E731
    plain = call()
    guide = apply_value_guidance(pipe.transformer, value, PROMPTS, guidance_scale=4.0, strength=0.3)
    hooked = call()
    remove_value_guidance(pipe.transformer)
    ours = guided_sample(pipe, value, PROMPTS, generator=generators(), strength=0.3, progress=False, **options)
    torch.testing.assert_close(hooked, value.backbone.pack(ours.latents), rtol=0, atol=5e-4)
    assert (hooked - plain).abs().max() > 0.02
    torch.testing.assert_close(torch.stack([v for _, v in guide.values]), ours.values, rtol=1e-3, atol=1e-4)
    extra = 0 if prompt_conditioned else 2 * 3 * depth / 4
    assert ours.evaluations.denoiser == pytest.approx(2 * 3 + extra)


def test_klein_shares_the_unconditional_branch_and_refuses_the_hook(make_value):
    pipe = tiny_flux2(klein=True)
    value = make_value(pipe, 3)
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent", **TEXT}
    sample = guided_sample(pipe, value, PROMPTS, strength=0.3, progress=False, **options)
    assert sample.evaluations.denoiser == 2 * 2 * 2
    apply_value_guidance(pipe.transformer, value, PROMPTS, guidance_scale=4.0)
    with pytest.raises(TypeError, match="cannot be guided from within; use guided_sample"):
        pipe(prompt=PROMPTS, **options)
    remove_value_guidance(pipe.transformer)


def test_reference_images_are_refused():
    backbone = backbone_of(tiny_flux2())
    call = backbone.inputs(LATENTS, torch.full((2,), 0.5), backbone.encode_text(tiny_flux2(), PROMPTS, **TEXT))
    latents, sigma, encoding, plain = backbone.read_inputs(call)
    assert torch.equal(latents, LATENTS) and sigma == 0.5 and plain and set(encoding) == {"prompt_embeds", "guidance"}
    call["img_ids"] = torch.cat([call["img_ids"], call["img_ids"] + torch.tensor([10, 0, 0, 0])])
    with pytest.raises(ValueError, match="img_ids: expected the tokens of one image"):
        backbone.read_inputs(call)
