"""Each transition against its published formula, in float64, and the guided score that a guided velocity carries."""

import math
from functools import partial

import pytest
import torch

from stitchvm_ext.sampling import TRANSITIONS, get_transition
from stitchvm_ext.sampling.transitions import flow_grpo, linear_sde, ode, score


@pytest.fixture
def point():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 4, 4, generator=generator) for _ in range(4)]  # z, u, grad V, noise


def test_ode_is_the_schedulers_step(point):
    from diffusers import FlowMatchEulerDiscreteScheduler

    z, u, _, _ = point
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    theirs = scheduler.step(u, scheduler.timesteps[0], z).prev_sample
    now, after = scheduler.sigmas[:2].tolist()
    assert torch.equal(ode(z, u, now, after), theirs)


def test_linear_sde_formula(point):
    """PEERS' form with a positive step d: ``z + (-u + g²/2 s) d + g sqrt(d) n``, s = -((1-t) u + z)/t, g = 3t²."""
    z, u, _, n = (x.double() for x in point)
    t, after = 0.6, 0.5
    d, g = t - after, 3 * t**2
    s = -((1 - t) * u + z) / t
    expected = z + (-u + 0.5 * g**2 * s) * d + g * math.sqrt(d) * n
    torch.testing.assert_close(linear_sde(*point[:2], t, after, point[3]).double(), expected, rtol=1e-5, atol=1e-6)
    constant = partial(linear_sde, g=lambda t: g)
    assert torch.equal(constant(*point[:2], t, after, point[3]), linear_sde(*point[:2], t, after, point[3]))


@pytest.mark.parametrize("t, after", [(0.6, 0.5), (1.0, 0.9)])
def test_flow_grpo_formula(point, t, after):
    """The published mean and deviation, the first step's 1-t taken from sigmas[1]."""
    z, u, _, n = (x.double() for x in point)
    dt = after - t
    std = 0.7 * math.sqrt(t / (1 - (after if t == 1 else t)))
    mean = z * (1 + std**2 / (2 * t) * dt) + u * (1 + std**2 * (1 - t) / (2 * t)) * dt
    expected = mean + std * math.sqrt(-dt) * n
    torch.testing.assert_close(flow_grpo(*point[:2], t, after, point[3]).double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(flow_grpo(*point[:2], t, after, point[3], noise_level=0.3).double(), expected, atol=1e-2)


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_guided_velocity_carries_the_guided_score(point, strength):
    """METHOD.md §5: with c = lambda t/(1-t), the step's drift gains ((nu~² - nu²)/2) grad(lambda V), nu~²/2 =
    -t/(1-t), and the score gains lambda grad V."""
    z, u, grad, n = point
    t, after = 0.4, 0.35
    guided = u - strength * t / (1 - t) * grad
    torch.testing.assert_close(score(z, guided, t), score(z, u, t) + strength * grad, rtol=1e-4, atol=1e-5)
    for step, nu in [(ode, 0.0), (linear_sde, 3 * t**2), (flow_grpo, 0.7 * math.sqrt(t / (1 - t)))]:
        nu_tilde_squared = -2 * t / (1 - t)
        gained = (nu_tilde_squared - nu**2) / 2 * strength * grad * (after - t)
        difference = step(z, guided, t, after, n) - step(z, u, t, after, n)
        torch.testing.assert_close(difference, gained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(TRANSITIONS))
def test_float32_whatever_comes_in(point, name):
    z, u, _, n = point
    low = [x.bfloat16() for x in (z, u)]
    result = TRANSITIONS[name](*low, 0.5, 0.45, n)
    assert result.dtype == torch.float32
    assert torch.equal(result, TRANSITIONS[name](low[0].float(), low[1].float(), 0.5, 0.45, n))


@pytest.mark.parametrize("name", list(TRANSITIONS))
def test_the_last_step_returns_the_denoised_estimate(point, name):
    z, u, _, n = point
    torch.testing.assert_close(TRANSITIONS[name](z, u, 0.25, 0.0, n), z - 0.25 * u)


@pytest.mark.parametrize("name", list(TRANSITIONS))
def test_noise_levels_must_fall(point, name):
    for now, after in [(0.5, 0.5), (0.4, 0.5), (1.2, 0.5), (0.5, -0.1)]:
        with pytest.raises(ValueError, match="sigma_next < sigma"):
            TRANSITIONS[name](*point[:2], now, after, point[3])


def test_lookup():
    assert get_transition("ode") is ode and get_transition(linear_sde) is linear_sde
    with pytest.raises(ValueError, match=r"one of \['flow_grpo', 'linear_sde', 'ode'\], got 'ddim'"):
        get_transition("ddim")
    with pytest.raises(TypeError, match="got int"):
        get_transition(3)
