"""Rollouts: the solvers, samples that stop at steps of their own, independence of the batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.sampling import guided_sample, pipeline_sigmas
from stitchvm_ext.sampling.encoding import encode_condition
from stitchvm_ext.sampling.transitions import dpm_solver_2m, ode
from stitchvm_ext.training.rollout import SOLVERS, roll_out
from tests.oracle import two_dimensional_world

PROMPTS = ["a red circle", "two blue squares", "a ring"]


@pytest.fixture
def backbone(pipe):
    return backbone_of(pipe)


@pytest.fixture
def sigmas(pipe, backbone):
    return pipeline_sigmas(pipe, backbone, 5, (16, 16))


def generators(rows):
    return [torch.Generator().manual_seed(row) for row in rows]


def condition(pipe, backbone, rows=(0, 1, 2), scale=1.0):
    texts = [PROMPTS[row] for row in rows]
    return encode_condition(pipe, backbone, texts, [""] * len(texts), scale, {"max_sequence_length": 0})


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_ode_is_the_samplers_own(pipe, backbone, sigmas, scale):
    found, tau = roll_out(backbone, condition(pipe, backbone, scale=scale), sigmas, generators(range(3)), (4, 16, 16))
    expected = guided_sample(
        pipe, None, PROMPTS, num_inference_steps=5, guidance_scale=scale, generator=generators(range(3)),
        max_sequence_length=0, output_type="latent", progress=False,
    )  # fmt: skip
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-4)
    assert tau.tolist() == [0.0] * 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_stops_where_it_is_told_and_does_not_feel_the_others(pipe, backbone, sigmas, solver):
    """Each alone, to its own stop, is the one in the batch; a longer rollout passes through the same state."""
    stops = [4, 2, 5]
    run = lambda rows, stops: roll_out(  # noqa: E731
        backbone, condition(pipe, backbone, rows), sigmas, generators(rows), (4, 16, 16), solver, stops
    )
    found, tau = run([0, 1, 2], stops)
    assert torch.equal(tau, sigmas[stops])
    for row, stop in enumerate(stops):
        alone, _ = run([row], [stop])
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    again, _ = run([2, 1], [5, 2])
    torch.testing.assert_close(again, found[[2, 1]], rtol=1e-4, atol=1e-4)
    ends, _ = run([0, 1, 2], None)
    torch.testing.assert_close(ends[2], found[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ends[1], found[1], atol=0.1)


def test_the_modulation_table_is_gone_after_a_rollout(pipe, backbone, sigmas):
    roll_out(backbone, condition(pipe, backbone), sigmas, generators(range(3)), (4, 16, 16))
    with torch.no_grad():  # another level and text would be refused by the table
        backbone.velocity(
            torch.randn(1, 4, 16, 16), 0.123, backbone.encode_text(pipe, ["a cross"], max_sequence_length=0)
        )


def integrate(world, step, count, steps):
    """From noise to z_0 [count, 2] with uniform steps, in float64-exact velocities."""
    z, previous = world.flat(world.noise(count, 0)).float(), None
    for sigma, after in itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        velocity = world.velocity(z.double(), sigma).float()
        if step is dpm_solver_2m:
            z, previous = step(z, velocity, sigma, after, previous)
        else:
            z = step(z, velocity, sigma, after)
    return z


def test_dpm_solver_converges_to_the_odes_solution_at_second_order():
    world = two_dimensional_world(quadratic=False)
    exact = integrate(world, dpm_solver_2m, 200, 1000)
    error = lambda step, steps: (integrate(world, step, 200, steps) - exact).norm(dim=1).median().item()  # noqa: E731
    assert (integrate(world, ode, 200, 4000) - exact).norm(dim=1).median() < 1e-3  # Euler agrees, in the limit
    assert error(dpm_solver_2m, 128) < 0.4 * error(dpm_solver_2m, 64) < 0.1 * error(ode, 64)


def test_dpm_solvers_first_and_last_steps_are_the_odes():
    z, velocity, other = (torch.randn(2, 3, generator=torch.Generator().manual_seed(k)) for k in range(3))
    first, previous = dpm_solver_2m(z, velocity, 0.9, 0.6)
    torch.testing.assert_close(first, ode(z, velocity, 0.9, 0.6))
    torch.testing.assert_close(previous[0], z - 0.9 * velocity)
    torch.testing.assert_close(dpm_solver_2m(z, velocity, 0.4, 0.0, (other, 0.6))[0], z - 0.4 * velocity)
    from_noise = dpm_solver_2m(z, velocity, 0.9, 0.6, (other, 1.0))[0]
    torch.testing.assert_close(from_noise, first)
    assert not torch.allclose(dpm_solver_2m(z, velocity, 0.6, 0.3, (other, 0.9))[0], ode(z, velocity, 0.6, 0.3))


@pytest.mark.parametrize("last", [False, True])
def test_dpm_solver_is_diffusers_own(last):
    """A whole trajectory against DPMSolverMultistepScheduler on the same flow sigmas."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++",
        solver_order=2, lower_order_final=False, final_sigmas_type="zero" if last else "sigma_min",
    )  # fmt: skip
    world = two_dimensional_world(quadratic=False)
    scheduler.set_timesteps(8)
    mine = theirs = world.noise(50, 0)
    previous = None
    for (sigma, after), timestep in zip(
        itertools.pairwise(scheduler.sigmas.tolist()), scheduler.timesteps, strict=True
    ):
        velocity = lambda z, s=sigma: world.velocity(world.flat(z), s).view_as(z).float()  # noqa: E731
        mine, previous = dpm_solver_2m(mine, velocity(mine), sigma, after, previous)
        theirs = scheduler.step(velocity(theirs), timestep, theirs).prev_sample
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
