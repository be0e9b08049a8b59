"""Tweedie and Monte Carlo against their definitions."""

import pytest
import torch

from stitchvm_ext import MonteCarloValue, TweedieValue
from stitchvm_ext.backbones.latents import decode_latents, encode_images


def test_latents_round_trip_shift_and_scale(pipe, images):
    raw = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    latents = encode_images(pipe.vae, images)
    torch.testing.assert_close(latents, (raw - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)
    with torch.no_grad():
        torch.testing.assert_close(decode_latents(pipe.vae, latents), pipe.vae.decode(raw).sample / 2 + 0.5)


def test_tweedie_is_the_reward_of_the_decoded_posterior_mean(pipe, reward, latents, condition):
    value = TweedieValue(pipe, reward)
    with torch.no_grad():
        u = value.backbone.guided_velocity(latents, 0.7, condition)
        expected = reward(decode_latents(pipe.vae, latents - 0.7 * u), condition.prompts)
        torch.testing.assert_close(value.value(latents, 0.7, condition), expected)


def test_tweedie_serves_step_and_gradient_from_one_pass(pipe, reward, latents, condition):
    value = TweedieValue(pipe, reward)
    velocity, v, grad = value.denoise_with_value(latents, 0.7, condition)
    with torch.no_grad():
        torch.testing.assert_close(
            velocity, value.backbone.guided_velocity(latents, 0.7, condition), rtol=1e-4, atol=1e-5
        )
    plain_v, plain_grad = value.value_and_grad(latents, 0.7, condition)
    torch.testing.assert_close(v, plain_v)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-3, atol=1e-6)
    assert grad.abs().sum() > 0


def test_monte_carlo_averages_rollouts_and_is_reproducible(pipe, reward, latents, condition):
    value = MonteCarloValue(pipe, reward, num_rollouts=3, num_steps=3)
    rewards = value.rollout_rewards(latents, 0.9, condition)
    assert rewards.shape == (3, 2)
    assert rewards.std(0).min() > 0  # the rollouts differ
    torch.testing.assert_close(value.value(latents, 0.9, condition), rewards.mean(0))


def test_monte_carlo_rolls_out_latents_of_one_level_together(pipe, reward, latents, condition):
    value = MonteCarloValue(pipe, reward, num_rollouts=2, num_steps=3)
    three, texts = latents[[0, 1, 0]], condition.rows([0, 1, 0])
    got = value.value(three, torch.tensor([0.9, 0.5, 0.9]), texts)
    torch.testing.assert_close(got[[0, 2]], value.value(three[[0, 2]], 0.9, texts.rows([0, 2])))
    torch.testing.assert_close(got[[1]], value.value(three[[1]], 0.5, texts.rows([1])))


def test_monte_carlo_at_no_noise_is_the_clean_reward(pipe, reward, latents, condition):
    value = MonteCarloValue(pipe, reward, num_rollouts=2, num_steps=4)
    with torch.no_grad():
        clean = reward(decode_latents(pipe.vae, latents).clamp(0, 1), condition.prompts)
    torch.testing.assert_close(value.value(latents, 0.0, condition), clean, rtol=1e-4, atol=1e-5)


def test_monte_carlo_has_no_gradient(pipe, reward, latents, condition):
    with pytest.raises(TypeError, match="no gradient"):
        MonteCarloValue(pipe, reward).value_and_grad(latents, 0.5, condition)


@pytest.mark.parametrize("name", ["num_rollouts", "num_steps"])
def test_monte_carlo_counts(pipe, reward, name):
    with pytest.raises(ValueError, match=name):
        MonteCarloValue(pipe, reward, **{name: 0})
