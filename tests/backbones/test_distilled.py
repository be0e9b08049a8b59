"""Few-step students are told from the models that they come from."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from stitchvm_ext import TweedieValue, guided_sample
from stitchvm_ext.backbones.distilled import few_step_reason, warn_if_few_step
from tests import tiny
from tests.tiny.flux import tiny_flux


def pipeline(denoiser="SD3Transformer2DModel", name=None, scheduler=None, pipe_config=None, adapters=(), **config):
    model = type(denoiser, (torch.nn.Module,), {})()
    model.config = config
    if adapters:
        model.peft_config = dict.fromkeys(adapters)
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    return SimpleNamespace(config={"_name_or_path": name, **(pipe_config or {})}, scheduler=scheduler), model


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"name": "stabilityai/stable-diffusion-3.5-large-turbo"}, "'turbo'"),
        ({"name": "stabilityai/sdxl-turbo", "denoiser": "UNet2DConditionModel"}, "'turbo'"),
        ({"name": "/models/SDXL-Lightning"}, "'lightning'"),
        ({"_name_or_path": "/cache/models--stabilityai--sdxl-turbo/snapshots/ab12/unet"}, "'turbo'"),
        ({"adapters": ["qwen_image_lightning"]}, "'lightning'"),
        ({"scheduler": LCMScheduler()}, "LCMScheduler"),
        ({"denoiser": "UNet2DConditionModel", "time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ({"denoiser": "FluxTransformer2DModel", "guidance_embeds": False}, "schnell"),
        ({"denoiser": "SanaTransformer2DModel", "guidance_embeds": True}, "Sprint"),
        ({"denoiser": "HunyuanImageTransformer2DModel", "use_meanflow": True}, "mean flow"),
        ({"denoiser": "Flux2Transformer2DModel", "pipe_config": {"is_distilled": True}}, "is_distilled"),
    ],
)
def test_students_are_recognised(case, reason):
    assert reason in few_step_reason(*pipeline(**case))


@pytest.mark.parametrize(
    "case",
    [
        {"name": "stabilityai/stable-diffusion-3.5-medium"},
        {"name": "black-forest-labs/FLUX.1-dev", "denoiser": "FluxTransformer2DModel", "guidance_embeds": True},
        {"name": "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "denoiser": "SanaTransformer2DModel"},
        {"name": "/home/turbo/lightning/stable-diffusion-xl-base-1.0", "denoiser": "UNet2DConditionModel"},
        {"denoiser": "HunyuanImageTransformer2DModel", "use_meanflow": False},
        {"adapters": ["default", "my-style"], "time_cond_proj_dim": None},
    ],
)
def test_their_teachers_are_not(case):
    assert few_step_reason(*pipeline(**case)) is None


def test_a_model_is_warned_of_once():
    pipe, model = pipeline(name="sd-turbo")
    with pytest.warns(UserWarning, match="distilled to few steps .*'turbo'.* no posterior mean"):
        warn_if_few_step(pipe, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_few_step(pipe, model)
        warn_if_few_step(*pipeline(name="sd-2"))


def test_guided_sample_warns_where_there_is_a_value(recwarn):
    from stitchvm_ext.backbones import distilled

    options = {"num_inference_steps": 1, "progress": False, "output_type": "latent", "max_sequence_length": 12}
    for guidance_embeds in (True, False):
        pipe = tiny_flux(guidance_embeds=guidance_embeds)
        distilled._warned.discard(pipe.transformer)
        value = TweedieValue(pipe, tiny.tiny_reward())
        recwarn.clear()
        guided_sample(pipe, None, "a red circle", **options)
        guided_sample(pipe, value, "a red circle", **options)
        guided_sample(pipe, value, "a red circle", **options)
        found = [w for w in recwarn if "distilled to few steps" in str(w.message)]
        assert len(found) == (0 if guidance_embeds else 1)
        assert all(w.filename == __file__ for w in found)
