"""Strength, schedule and window; scale-freeness; what happens to zeros, extremes and NaN."""

from functools import partial

import pytest
import torch

from stitchvm_ext.sampling import TRANSITIONS, Guidance, get_transition, sample_dps
from stitchvm_ext.sampling.denoiser import Denoiser
from tests.oracle import OracleValue, sampling_task, two_dimensional_world


@pytest.fixture
def velocity_and_grad():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2)]


def norms(x):
    return x.flatten(1).norm(dim=1)


def test_modes(velocity_and_grad):
    u, grad = velocity_and_grad
    relative = Guidance(0.25).term(u, grad, 0.4)
    torch.testing.assert_close(norms(relative), 0.25 * norms(u))
    torch.testing.assert_close(relative / norms(relative).view(-1, 1, 1, 1), grad / norms(grad).view(-1, 1, 1, 1))
    torch.testing.assert_close(Guidance(2.0, "score").term(u, grad, 0.4), 2 * 0.4 / 0.6 * grad)
    torch.testing.assert_close(Guidance(2.0, "raw").term(u, grad, 0.4), 2 * grad)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_relative_mode_does_not_see_the_rewards_scale(velocity_and_grad, scale):
    u, grad = velocity_and_grad
    torch.testing.assert_close(Guidance(0.3).term(u, grad * scale, 0.5), Guidance(0.3).term(u, grad, 0.5))


def test_relative_norms_are_per_sample_and_a_zero_gradient_gives_none(velocity_and_grad):
    u, grad = velocity_and_grad
    grad = grad * torch.tensor([1.0, 1e6, 0.0]).view(-1, 1, 1, 1)
    term = Guidance(0.3).term(u, grad, 0.5)
    assert term[2].eq(0).all()
    for b in range(3):
        assert torch.equal(term[b : b + 1], Guidance(0.3).term(u[b : b + 1], grad[b : b + 1], 0.5))


def test_low_precision_velocities_are_measured_in_float32():
    u = torch.full((1, 1, 300, 300), 3.0, dtype=torch.float16)  # the sum of squares overflows float16
    term = Guidance(0.5).term(u, torch.ones(1, 1, 300, 300), 0.5)
    torch.testing.assert_close(term, torch.full_like(term, 1.5))


def test_schedules(velocity_and_grad):
    u, grad = velocity_and_grad
    for schedule, weight in [("constant", 1.0), ("sigma", 0.8), ("alpha", 0.2), (lambda sigma: sigma**2, 0.64)]:
        term = Guidance(0.5, schedule=schedule).term(u, grad, 0.8)
        torch.testing.assert_close(term, weight * Guidance(0.5).term(u, grad, 0.8))
    assert not Guidance(schedule="alpha").is_active(0, 1.0)
    with pytest.raises(ValueError, match="schedule.*sigma 0.5.*nan"):
        Guidance(schedule=lambda sigma: float("nan")).is_active(0, 0.5)


def test_window_and_every():
    active = lambda guidance: [k for k in range(10) if guidance.is_active(k, 0.5)]  # noqa: E731
    assert active(Guidance()) == list(range(10))
    assert active(Guidance(window=(2, 9), every=3)) == [2, 5, 8]
    assert active(Guidance(window=(7, None))) == [7, 8, 9]
    assert active(Guidance(strength=0.0)) == []
    assert not Guidance(mode="score").is_active(0, 1.0) and Guidance(mode="score").is_active(0, 0.999)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"strength": -1.0}, ValueError, "strength"),
        ({"strength": float("inf")}, ValueError, "strength"),
        ({"strength": "1"}, TypeError, "strength"),
        ({"mode": "absolute"}, ValueError, r"mode.*\['relative', 'score', 'raw'\], got 'absolute'"),
        ({"schedule": "cosine"}, ValueError, "schedule.*'cosine'"),
        ({"schedule": [1.0]}, ValueError, "schedule"),
        ({"window": (3, 3)}, ValueError, "window"),
        ({"window": (0.2, 0.8)}, ValueError, "window"),
        ({"window": 4}, ValueError, "window"),
        ({"every": 0}, ValueError, "every"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Guidance(**options)


class Broken(OracleValue):
    """Goes wrong below a noise level, in one tensor of one sample."""

    def __init__(self, world, broken):
        super().__init__(world)
        self.broken = broken

    def branches_with_value(self, latents, sigma, condition):
        velocity, uncond, value, gradient = super().branches_with_value(latents, sigma, condition)
        if sigma < 0.5:
            {"velocity": velocity, "value": value, "gradient": gradient}[self.broken][1] = float("nan")
        return velocity, uncond, value, gradient


@pytest.mark.parametrize("transition", [get_transition("ode"), partial(get_transition("ode"))], ids=["fused", "plain"])
@pytest.mark.parametrize("broken", ["velocity", "value", "gradient"])
def test_non_finite_values_stop_with_step_and_tensor(broken, transition):
    world = two_dimensional_world(quadratic=False)
    value = Broken(world, broken)
    with pytest.raises(
        FloatingPointError, match=rf"^{broken}: non-finite values at step 6 \(sigma 0.4\) in samples \[1\]"
    ):
        sample_dps(sampling_task(world, value, 3, transition=transition), Guidance())


def test_non_finite_velocity_of_an_unguided_step_stops_too():
    world = two_dimensional_world(quadratic=False)
    backbone = OracleValue(world).backbone
    backbone.branches = lambda latents, sigma, condition: (torch.full_like(latents, float("inf")), None)
    with pytest.raises(FloatingPointError, match="^latents: .* step 0"):
        sample_dps(sampling_task(world, None, 3, denoiser=Denoiser(backbone, None)), Guidance())


def test_finite_tensors_whose_norm_is_not_float32_are_no_error():
    """The norm is a hint; what decides is the tensors themselves."""
    world = two_dimensional_world(quadratic=False)
    backbone = OracleValue(world).backbone
    backbone.branches = lambda latents, sigma, condition: (torch.full_like(latents, 3e38), None)
    task = sampling_task(world, None, 3, denoiser=Denoiser(backbone, None), latents=torch.zeros(3, 1, 1, 2))
    z = sample_dps(task, Guidance()).latents
    torch.testing.assert_close(z, torch.full_like(z, -3e38))


@pytest.mark.parametrize("mode", ["relative", "score", "raw"])
@pytest.mark.parametrize("transition", list(TRANSITIONS))
def test_the_fused_step_is_the_plain_one(transition, mode):
    """A partial hides what the transition is, so its steps run one operation after the other."""
    world = two_dimensional_world(quadratic=True)
    value = OracleValue(world)

    def run(step):
        task = sampling_task(world, value, 50, steps=8, transition=step)
        return sample_dps(task, Guidance(0.3, mode, "alpha", every=2))

    fused, plain = (run(step) for step in (get_transition(transition), partial(get_transition(transition))))
    torch.testing.assert_close(fused.latents, plain.latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.values, plain.values, rtol=1e-4, atol=1e-4, equal_nan=True)
