"""Strength, schedule and window; scale-freeness; what happens to zeros, extremes and NaN."""

import pytest
import torch

from stitchvm_ext.sampling import Guidance, get_transition, sample_dps
from tests.oracle import OracleValue, two_dimensional_world


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

    def denoise_with_value(self, latents, sigma, condition):
        tensors = dict(
            zip(("velocity", "value", "gradient"), super().denoise_with_value(latents, sigma, condition), strict=True)
        )
        if sigma < 0.5:
            tensors[self.broken][1] = float("nan")
        return tuple(tensors.values())


@pytest.mark.parametrize("broken", ["velocity", "value", "gradient"])
def test_non_finite_values_stop_with_step_and_tensor(broken):
    world = two_dimensional_world(quadratic=False)
    value = Broken(world, broken)
    with pytest.raises(
        FloatingPointError, match=rf"^{broken}: non-finite values at step 6 \(sigma 0.4\) in samples \[1\]"
    ):
        sample_dps(
            value.backbone, value, world.noise(3, 0), torch.linspace(1, 0, 11), world.condition(3),
            guidance=Guidance(), transition=get_transition("ode"),
        )  # fmt: skip


def test_non_finite_velocity_of_an_unguided_step_stops_too():
    world = two_dimensional_world(quadratic=False)
    backbone = OracleValue(world).backbone
    backbone.guided_velocity = lambda latents, sigma, condition: torch.full_like(latents, float("inf"))
    with pytest.raises(FloatingPointError, match="^latents: .* step 0"):
        sample_dps(
            backbone, None, world.noise(3, 0), torch.linspace(1, 0, 11), world.condition(3),
            guidance=Guidance(), transition=get_transition("ode"),
        )  # fmt: skip
