"""Guidance in a world with closed forms: the formulas themselves, then samplers against the tilted distribution."""

from __future__ import annotations

import pytest
import torch

from stitchvm_ext.sampling import TRANSITIONS, Guidance, sample_dps
from tests.oracle import (
    Mixture,
    OracleValue,
    OracleWorld,
    QuadraticReward,
    image_like_world,
    sampling_task,
    two_dimensional_world,
)

WORLDS = {
    "linear": two_dimensional_world(quadratic=False),
    "quadratic": two_dimensional_world(quadratic=True),
    "image": image_like_world(),
}


def run(world, value, guidance, transition="ode", count=2000, steps=100, seed=0):
    """Final latents [B, D] and values [T, B]. The noise levels are denser towards t = 0, where the mixture
    separates.
    """
    task = sampling_task(world, value, count, steps=steps, power=1.5, transition=transition, seed=seed)
    result = sample_dps(task, guidance)
    return world.flat(result.latents), result.values


def deviations(z, target: Mixture) -> torch.Tensor:
    """How far the sample's mean, covariance and component weights are from ``target``'s, in standard errors."""
    centred = z - target.mean
    products = torch.einsum("bi,bj->bij", centred, centred).flatten(1)
    shares = target.responsibilities(z)
    statistics = torch.cat([centred, products - target.cov.flatten(), shares - target.weights], 1)
    return statistics.mean(0).abs() / (statistics.std(0) / len(z) ** 0.5)


# -- the formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "quadratic"])
@pytest.mark.parametrize("t", [0.15, 0.5, 0.9])
def test_formulas_agree_with_quadrature(name, t):
    """Posterior mean, velocity, expected reward and soft value, integrated on a grid over z_0."""
    world, scale = WORLDS[name], 1.5
    axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    prior = world.prior.log_components(grid).logsumexp(1)
    for z in torch.tensor([[0.3, -0.2], [-1.0, 0.9]], dtype=torch.float64):
        log_joint = prior - ((z - (1 - t) * grid) ** 2).sum(1) / (2 * t * t)
        weights = log_joint.softmax(0)
        mean = weights @ grid
        reward = world.reward(grid)
        batch = z[None]
        torch.testing.assert_close(world.denoised(batch, t)[0], mean, rtol=1e-8, atol=1e-8)
        eps = (z - (1 - t) * grid) / t
        torch.testing.assert_close(world.velocity(batch, t)[0], weights @ (eps - grid), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(world.expected_reward(batch, t)[0], weights @ reward, rtol=1e-8, atol=1e-8)
        soft = ((weights.log() + scale * reward).logsumexp(0)) / scale
        torch.testing.assert_close(world.soft_value(batch, t, scale)[0], soft, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["quadratic", "image"])
def test_formulas_agree_with_monte_carlo(name):
    """The tilted mixture against importance-weighted draws of the prior."""
    world, scale = WORLDS[name], 0.8
    z = world.prior.sample(200_000, seed=3)
    weights = (scale * world.reward(z)).softmax(0)
    target = world.tilted(scale)
    effective = 1 / (weights**2).sum()
    assert effective > 20_000
    error = (weights @ z - target.mean).abs() / (target.cov.diagonal() / effective).sqrt()
    assert error.max() < 4.5
    shares = weights @ world.prior.responsibilities(z)
    assert (shares - target.weights).abs().max() < 4.5 * 0.5 / effective.sqrt()


@pytest.mark.parametrize("name", list(WORLDS))
@pytest.mark.parametrize("t", [0.1, 0.6, 0.95])
def test_value_gradient(name, t):
    """The gradient's formula, autograd through the value, and central differences agree in float64."""
    world = WORLDS[name]
    z = world.flat(world.noise(3, seed=1)).requires_grad_()
    (auto,) = torch.autograd.grad(world.soft_value(z, t, 1.3).sum(), z)
    z = z.detach()
    torch.testing.assert_close(world.soft_value_grad(z, t, 1.3), auto, rtol=1e-9, atol=1e-9)
    direction = torch.ones_like(z)
    ahead, behind = (world.soft_value(z + h * direction, t, 1.3) for h in (1e-5, -1e-5))
    torch.testing.assert_close((ahead - behind) / 2e-5, (auto * direction).sum(1), rtol=1e-6, atol=1e-6)


def test_small_scale_soft_value_is_expected_reward_plus_variance():
    """METHOD.md §1: soft value = lambda E[r] + lambda²/2 Var[r] + O(lambda³); here divided by lambda, on a grid of
    lambdas.
    """
    world, t = WORLDS["quadratic"], 0.5
    z = world.flat(world.noise(5, seed=2))
    expected = world.expected_reward(z, t)
    first, second = ((world.soft_value(z, t, s) - expected) / s for s in (1e-3, 2e-3))
    assert first.min() > 0  # half the variance of the reward given z_t
    torch.testing.assert_close(first, second, rtol=1e-2, atol=0)


# -- samplers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transition", list(TRANSITIONS))
def test_plain_sampling_reaches_the_prior(transition):
    world = WORLDS["quadratic"]
    z, values = run(world, None, Guidance(), transition)
    assert values.isnan().all()
    assert deviations(z, world.prior).max() < 4


@pytest.mark.parametrize("transition", list(TRANSITIONS))
@pytest.mark.parametrize("name", list(WORLDS))
def test_guided_samples_match_the_tilted_distribution(name, transition):
    """mode="score" with the soft value at its own scale samples p exp(scale r): mean, covariance and component
    weights.
    """
    world, scale = WORLDS[name], 1.5
    z, values = run(world, OracleValue(world, "soft", scale), Guidance(strength=scale, mode="score"), transition)
    target = world.tilted(scale)
    assert deviations(z, target).max() < 4, deviations(z, target)
    assert deviations(z, world.prior).max() > 8  # the prior is told apart, so the line above says something
    assert values[0].isnan().all() and values[1:].isfinite().all()  # t = 1 is not guided


@pytest.mark.parametrize("mode, strength", [("relative", 0.1), ("score", 0.5), ("raw", 0.3)])
@pytest.mark.parametrize("transition", list(TRANSITIONS))
def test_guidance_raises_the_value(transition, mode, strength):
    """The sign: guided rewards are higher for every transition and mode, from the same noise, and more for more
    strength.
    """
    world = WORLDS["linear"]
    value = OracleValue(world, "expected")
    means = [
        world.reward(run(world, value, Guidance(strength=s, mode=mode), transition, count=1000, steps=60)[0]).mean()
        for s in (0.0, strength, 2 * strength)
    ]
    assert means[0] + 0.05 < means[1] and means[1] + 0.05 < means[2]


def test_values_follow_the_trajectory():
    """Late values approach the final reward; the mean soft value under its own tilted path does not drift downwards."""
    world = WORLDS["linear"]
    z, values = run(world, OracleValue(world, "expected"), Guidance(strength=1.0, mode="score"), count=500)
    final = world.reward(z).float()
    torch.testing.assert_close(values[-1], final, rtol=0, atol=0.05)
    early, late = values[1].mean(), values[-1].mean()
    assert late > early + 0.1


@pytest.mark.parametrize("curvature, sign", [(-1.0, 1), (1.0, -1)])
def test_tweedie_bias_has_jensens_sign(curvature, sign):
    """``r(E[z_0|z_t])`` is above ``E[r|z_t]`` for concave rewards, below for convex ones."""
    base = WORLDS["quadratic"]
    world = OracleWorld(
        base.prior, QuadraticReward(base.reward.b, curvature * torch.eye(2, dtype=torch.float64)), base.shape
    )
    latents = world.noise(50, seed=4)
    tweedie, expected = (
        OracleValue(world, kind).value(latents, 0.6, world.condition(50)) for kind in ("tweedie", "expected")
    )
    assert (sign * (tweedie - expected)).min() > 0.01


def test_tweedie_guidance_overshoots_a_concave_reward():
    """One Gaussian, ``r = -z²``: the exact tilt has variance 1/(1+2 lambda); the Tweedie value ignores the posterior's
    width, so its steeper gradient leaves less."""
    f64 = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    prior = Mixture(f64([1.0]), f64([[0.0]]), f64([[[1.0]]]))
    world = OracleWorld(prior, QuadraticReward(f64([0.0]), f64([[-2.0]])), (1, 1, 1))
    guidance = Guidance(strength=1.0, mode="score")
    exact, tweedie = (run(world, OracleValue(world, kind, 1.0), guidance)[0].var() for kind in ("soft", "tweedie"))
    error = 4 * (1 / 3) * (2 / 2000) ** 0.5
    assert abs(exact - 1 / 3) < error
    assert tweedie < 1 / 3 - 2 * error
