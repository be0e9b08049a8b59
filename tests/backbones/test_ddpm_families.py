"""Backbones of the DDPM kind: the calls of their pipelines, and values stitched onto them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler

from stitchvm_ext import StitchedValue, guided_sample, stitch
from stitchvm_ext.backbones import Condition, backbone_of
from stitchvm_ext.backbones.identity import check_fingerprint, fingerprint
from stitchvm_ext.value import FinetuneConfig
from tests import tiny
from tests.tiny.catalogue import PIPELINES
from tests.tiny.unet import ddim

PROMPTS = ["a red circle", "two blue rings"]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart-sigma", "pixart-alpha", "hunyuan-dit", "hunyuan-dit-1.2"])
def test_the_denoiser_reads_what_its_pipeline_gives_it(name):
    """At a size that is not square: sizes, rotary positions, texts and masks are the pipeline's own."""
    pipe = PIPELINES[name]()
    b = backbone_of(pipe)
    calls = []

    class Called(Exception):
        pass

    def record(module, args, kwargs):
        names = ("hidden_states", "timestep") if hasattr(pipe, "transformer") else ("sample", "timestep")
        calls.append({**dict(zip(names, args, strict=False)), **kwargs})
        raise Called

    handle = b.denoiser.register_forward_pre_hook(record, with_kwargs=True)
    h, w = 8, 24
    latents = torch.randn(2, 4, h, w, generator=torch.Generator().manual_seed(0))
    size = {"height": h * b.pixel_factor(pipe), "width": w * b.pixel_factor(pipe)}
    options = {"guidance_scale": 1.0, "num_inference_steps": 3, **getattr(pipe, "test_options", {})}
    try:
        with pytest.raises(Called):
            pipe(PROMPTS, latents=latents, **size, **options)
    finally:
        handle.remove()
    theirs = {n: v for n, v in calls[0].items() if v is not None and n != "return_dict"}
    sigma = b.process.flow_time(theirs["timestep"].expand(2))
    ours = b.call_inputs(b.process.flow_latents(latents, sigma), sigma, b.encode_text(pipe, PROMPTS))
    theirs["timestep"] = theirs["timestep"].expand(2).float()
    for argument, expected in theirs.items():
        tolerance = {"rtol": 1e-4, "atol": 2e-3 if argument == "timestep" else 1e-5}
        torch.testing.assert_close(ours[argument], expected, **tolerance)
    assert set(ours) == set(theirs)


@pytest.mark.parametrize(
    ("name", "depth"),
    [("sd15", 1), ("sd15", 3), ("sdxl-v", 2), ("pixart-sigma", 2), ("hunyuan-dit", 2), ("hunyuan-dit", 4)],
)
def test_a_value_is_stitched_saved_and_guides(name, depth, tmp_path):
    """Search over cuts of whatever widths and grids, a few steps of finetuning, folder, shared prefix, sampling."""
    pipe, reward = PIPELINES[name](), tiny.tiny_reward()
    b = backbone_of(pipe)
    side = 16 * b.pixel_factor(pipe)
    images = F.interpolate(torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(0)), side, mode="bilinear")
    config = FinetuneConfig(batch_size=4, epochs=2)
    value = stitch(
        pipe, reward, images, depth=depth, layer=1, work_dir=tmp_path / "work", probe_images=16, config=config,
        progress=False,
    )  # fmt: skip
    assert value.stitch.project.in_features == b.width(depth) and value.grid == b.grid((16, 16), depth)
    value.save_pretrained(tmp_path / "value")
    again = StitchedValue.from_pretrained(tmp_path / "value", pipe)
    again.suffix.text = value.suffix.text  # the text tower belongs to the reward, which has no folder here

    uncond = b.encode_negative(pipe, ["", ""])
    condition = Condition(tuple(PROMPTS), b.encode_text(pipe, PROMPTS), uncond, guidance_scale=3.0)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    before, after = value.value_and_grad(latents, 0.4, condition), again.value_and_grad(latents, 0.4, condition)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert before[1].flatten(1).any(1).all()

    assert value.can_share(condition)
    velocity, shared_value, shared_grad = value.denoise_with_value(latents, 0.4, condition)
    with torch.no_grad():
        plain = b.guided_velocity(latents, 0.4, condition)
    torch.testing.assert_close(velocity, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shared_value, before[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared_grad, before[1], rtol=1e-3, atol=1e-6)

    run = lambda strength: guided_sample(  # noqa: E731
        pipe, value, PROMPTS, num_inference_steps=4, guidance_scale=3.0, strength=strength, output_type="latent",
        generator=torch.Generator().manual_seed(0), progress=False,
    )  # fmt: skip
    plain, guided = run(0.0), run(0.2)
    assert guided.valued_steps > 0 and guided.latents.isfinite().all()
    assert not torch.equal(guided.latents, plain.latents)


def test_a_value_knows_the_noise_levels_of_its_backbone():
    """The same weights under a scheduler of other levels read another time at the same noise."""
    pipe = copy.copy(PIPELINES["sd15"]())
    known = fingerprint(backbone_of(pipe), 1)
    check_fingerprint(backbone_of(pipe), known, 1)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    check_fingerprint(backbone_of(pipe), known, 1)  # another solver over the same levels
    pipe.scheduler = ddim("v_prediction", zero_snr=True)
    with pytest.raises(ValueError, match="made for other noise levels"):
        check_fingerprint(backbone_of(pipe), known, 1)
