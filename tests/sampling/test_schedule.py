"""Noise levels are the installed scheduler's, and the pipeline's scheduler is left alone."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.sampling import pipeline_sigmas


def with_scheduler(pipe, scheduler):
    return StableDiffusion3Pipeline(**{**pipe.components, "scheduler": scheduler})


def state(scheduler):
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(scheduler).items()}


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3.0},
        {"shift": 1.0, "use_karras_sigmas": True},
        {"use_dynamic_shifting": True},
        {"shift_terminal": 0.1},
    ],
)
def test_equal_to_what_the_pipeline_itself_uses(pipe, options):
    pipe = with_scheduler(pipe, FlowMatchEulerDiscreteScheduler(**options))
    pipe.set_progress_bar_config(disable=True)
    before = copy.deepcopy(state(pipe.scheduler))
    sigmas = pipeline_sigmas(pipe, backbone_of(pipe), 5, (16, 16))
    assert state(pipe.scheduler) == before
    assert sigmas.dtype == torch.float32 and sigmas.shape == (6,)
    pipe("a red circle", num_inference_steps=5, output_type="latent", max_sequence_length=0, guidance_scale=1.0)
    assert torch.equal(sigmas, pipe.scheduler.sigmas.cpu())


def test_a_scheduler_in_mid_run_is_no_obstacle(pipe):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(3)
    scheduler.set_shift(3.0)  # not in the config
    sigmas = pipeline_sigmas(with_scheduler(pipe, scheduler), backbone_of(pipe), 4, (16, 16))
    assert len(scheduler.sigmas) == 4
    scheduler.set_timesteps(4)
    assert torch.equal(sigmas, scheduler.sigmas)


def test_other_schedulers_are_refused(pipe):
    with pytest.raises(TypeError, match="flow-matching scheduler.*got DDIMScheduler"):
        pipeline_sigmas(with_scheduler(pipe, DDIMScheduler()), backbone_of(pipe), 4, (16, 16))
    inverted = with_scheduler(pipe, FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="decrease"):
        pipeline_sigmas(inverted, backbone_of(pipe), 4, (16, 16))
