"""Forward processes: the flow's coordinates against closed forms and against diffusers' own DDIM."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from stitchvm_ext.backbones import DDPM, RectifiedFlow, ReversedFlow, backbone_of, expand_sigma
from stitchvm_ext.backbones.process import PREDICTION_TYPES
from tests.tiny.catalogue import PIPELINES
from tests.tiny.unet import ddim

SIGMA = torch.tensor([0.05, 0.3, 0.731, 0.9])


def stable_diffusion(prediction_type: str = "epsilon", zero_snr: bool = False) -> DDPM:
    return DDPM.from_scheduler(ddim(prediction_type, zero_snr))


def noised(sigma: torch.Tensor, seed: int = 0):
    """Clean latents, noise, and their flow latents."""
    generator = torch.Generator().manual_seed(seed)
    z_0, eps = (torch.randn(len(sigma), 4, 3, 5, generator=generator) for _ in range(2))
    t = expand_sigma(sigma, z_0)
    return z_0, eps, (1 - t) * z_0 + t * eps


def variance_preserving(sigma: torch.Tensor):
    """(alpha, sigma) of the process whose latents are multiples of the flow's, [B, 1, 1, 1]."""
    t = sigma.double().view(-1, 1, 1, 1)
    norm = (t**2 + (1 - t) ** 2).sqrt()
    return ((1 - t) / norm).float(), (t / norm).float()


@pytest.mark.parametrize("process", [RectifiedFlow(), ReversedFlow(), stable_diffusion()])
def test_latents_go_there_and_back(process):
    _, _, z = noised(SIGMA)
    back = process.flow_latents(process.model_latents(z, SIGMA), SIGMA)
    torch.testing.assert_close(back, z)


def test_flows_take_their_own_time_and_direction():
    z_0, eps, z = noised(SIGMA)
    assert torch.equal(RectifiedFlow().timestep(SIGMA), 1000 * SIGMA)
    assert torch.equal(RectifiedFlow(1.0).velocity(eps - z_0, z, SIGMA), eps - z_0)
    assert torch.equal(ReversedFlow().timestep(SIGMA), 1 - SIGMA)
    assert torch.equal(ReversedFlow().velocity(z_0 - eps, z, SIGMA), eps - z_0)


def test_model_latents_preserve_variance():
    z_0, eps, z = noised(SIGMA)
    alpha, sigma = variance_preserving(SIGMA)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    torch.testing.assert_close(stable_diffusion().model_latents(z, SIGMA), alpha * z_0 + sigma * eps)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_velocity_of_a_model_that_knows_the_noise(prediction_type):
    z_0, eps, z = noised(SIGMA)
    alpha, sigma = variance_preserving(SIGMA)
    output = {"epsilon": eps, "sample": z_0, "v_prediction": alpha * eps - sigma * z_0}[prediction_type]
    velocity = stable_diffusion(prediction_type).velocity(output, z, SIGMA)
    torch.testing.assert_close(velocity, eps - z_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_velocity_of_the_optimal_model_of_a_gaussian(prediction_type):
    """z_0 ~ N(m, s²): the optimal predictions and E[eps - z_0 | z_t] are known, and agree at any time."""
    m, s = 0.7, 1.6
    _, _, z = noised(SIGMA)
    process = stable_diffusion(prediction_type)
    x = process.model_latents(z, SIGMA)
    alpha, sigma = variance_preserving(SIGMA)
    clean = m + alpha * s**2 * (x - alpha * m) / (alpha**2 * s**2 + sigma**2)
    noise = (x - alpha * clean) / sigma
    output = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[prediction_type]
    t = expand_sigma(SIGMA, z)
    expected = (t - (1 - t) * s**2) * (z - (1 - t) * m) / ((1 - t) ** 2 * s**2 + t**2) - m
    torch.testing.assert_close(process.velocity(output, z, SIGMA), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_timesteps_and_flow_times_are_inverse(zero_snr):
    process = stable_diffusion("v_prediction", zero_snr)
    steps = torch.tensor([0.0, 0.4, 1.0, 17.25, 500.5, 981.0, 998.0, 999.0])
    times = process.flow_time(steps)
    assert (times.diff() > 0).all() and times.isfinite().all()
    torch.testing.assert_close(process.timestep(times), steps, rtol=0, atol=2e-3)
    a = ddim("v_prediction", zero_snr).alphas_cumprod[500].double()
    assert process.flow_time(torch.tensor(500)) == ((1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())).float()


def test_times_that_no_timestep_has():
    """Beyond the noisiest timestep it is that one, below the least noisy one that; at pure noise the last."""
    process = stable_diffusion()
    assert 0.93 < process.max_sigma < 0.94
    assert process.timestep(torch.tensor([0.0, 0.01, 0.95, 1.0])).tolist() == [0, 0, 999, 999]
    z_0, eps, z = noised(torch.tensor([0.0, 1.0]))
    for prediction_type in PREDICTION_TYPES:
        assert stable_diffusion(prediction_type).velocity(eps, z, torch.tensor([0.0, 1.0])).isfinite().all()
    zero_snr = stable_diffusion("v_prediction", zero_snr=True)
    assert zero_snr.max_sigma == 1.0 and zero_snr.timestep(torch.tensor(1.0)) == 999
    torch.testing.assert_close(zero_snr.velocity(-z_0, z, torch.tensor([1.0, 1.0]))[1], (eps - z_0)[1])


def test_fractional_timesteps_are_those_of_diffusers_noise_levels():
    """Karras's levels lie between the timesteps; diffusers' Euler gives the model fractional ones."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    scheduler.set_timesteps(12)
    assert (scheduler.timesteps % 1 != 0).any()
    ratio = scheduler.sigmas[:-1]  # sigma / alpha
    times = ratio / (1 + ratio)
    process = DDPM.from_scheduler(scheduler)
    torch.testing.assert_close(process.flow_time(scheduler.timesteps), times, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(process.timestep(times), scheduler.timesteps, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [*((kind, False) for kind in PREDICTION_TYPES), ("v_prediction", True), ("sample", True)],
)
def test_an_euler_step_of_the_flow_is_a_ddim_step(prediction_type, zero_snr):
    scheduler = ddim(prediction_type, zero_snr)
    scheduler.set_timesteps(5)
    process = DDPM.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    times = [*process.flow_time(scheduler.timesteps), torch.tensor(0.0)]
    z = process.flow_latents(x, times[0].expand(2))
    for step, now, following in zip(scheduler.timesteps, times[:-1], times[1:], strict=True):
        output = torch.randn(x.shape, generator=generator)
        torch.testing.assert_close(process.model_latents(z, now.expand(2)), x, rtol=1e-4, atol=1e-4)
        x = scheduler.step(output, step, x).prev_sample
        z = z + (following - now) * process.velocity(output, z, now.expand(2))
    torch.testing.assert_close(z, x, rtol=1e-4, atol=1e-4)


def test_what_is_refused():
    with pytest.raises(ValueError, match="prediction_type: expected one of .*, got 'score'"):
        DDPM(torch.tensor([0.9, 0.1]), "score")
    with pytest.raises(ValueError, match="expected v_prediction or sample where the last timestep is pure noise"):
        DDPM.from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="expected one with alphas_cumprod .* got FlowMatchEulerDiscreteScheduler"):
        DDPM.from_scheduler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="expected timestep_type discrete, got 'continuous'"):
        DDPM.from_scheduler(EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="expected the pipeline, whose scheduler .* got a bare UNet2DConditionModel"):
        backbone_of(PIPELINES["sd15"]().unet)
