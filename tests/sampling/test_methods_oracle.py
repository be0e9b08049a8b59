"""Particle methods in a world with closed forms: whom they sample, what they estimate, and where they are biased."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stitchvm_ext.sampling import (
    FK,
    SVDD,
    BestOfN,
    Guidance,
    Search,
    sample_best_of_n,
    sample_dps,
    sample_fk,
    sample_search,
    sample_svdd,
)
from stitchvm_ext.sampling.noise import Noise
from stitchvm_ext.sampling.particles import POTENTIALS, ParticleWeights
from stitchvm_ext.sampling.transitions import ReverseSDE
from tests.oracle import OracleValue, image_like_world, sampling_task, two_dimensional_world
from tests.sampling.test_oracle import deviations

WORLD = two_dimensional_world(quadratic=True)
SCALE = 0.8
EVENTS = {"resample_window": (0, None), "resample_every": 10}
SAMPLE = {"select": "sample", "scale": SCALE, "ess_threshold": 0.5, **EVENTS}

# The reversal of the forward process, nu² = 2t/(1-t). Under it the chain's own E[exp r(z_0) | z_t] is the soft value.
REVERSAL = ReverseSDE(lambda sigma, sigma_next: math.sqrt(2 * sigma / (1 - (sigma if sigma < 1 else sigma_next))))


def task(value, samples, particles=1, **options):
    settings = {"steps": 40, "power": 1.5, "transition": "flow_grpo", **options}
    return sampling_task(WORLD, value, samples, particles=particles, **settings)


def plain_rewards(count=40_000, **options):
    """Rewards of the same chain without steering."""
    latents = sample_dps(task(None, count, **options), Guidance()).latents
    return WORLD.reward(WORLD.flat(latents))


# -- whom they sample --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["soft", "tweedie"])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_fk_samples_the_tilted_distribution(potential, kind):
    """Whatever the intermediate potentials: the last one makes every path weigh exp(scale reward)."""
    value = OracleValue(WORLD, kind, SCALE)
    result = sample_fk(task(value, 1000, 64), FK(num_particles=64, potential=potential, **SAMPLE))
    target = WORLD.tilted(SCALE)
    assert deviations(WORLD.flat(result.latents), target).max() < 4
    assert deviations(WORLD.flat(result.latents), WORLD.prior).max() > 6


@pytest.mark.parametrize("mode, strength", [("score", SCALE), ("relative", 0.1)])
def test_twisted_proposals_sample_the_tilted_distribution(mode, strength):
    """The weights take out what guidance by another value (Tweedie's) and of any strength put in."""
    guidance = Guidance(strength, mode)
    options = FK(num_particles=64, guidance=guidance, **SAMPLE)
    result = sample_fk(task(OracleValue(WORLD, "tweedie", SCALE), 1000, 64), options)
    assert deviations(WORLD.flat(result.latents), WORLD.tilted(SCALE)).max() < 4


def test_guided_proposals_need_fewer_particles():
    """The exact soft value's gradient makes the paths all but equally likely: their weights spread less."""
    value = OracleValue(WORLD, "soft", SCALE)
    still = {"scale": SCALE, "num_particles": 16, "resample_window": (0, 1)}  # weights carried to the end
    spread = [
        sample_fk(task(value, 300, 16, transition=REVERSAL), FK(guidance=guidance, ess_threshold=1e-9, **still))
        .log_weights.std(1)
        .mean()
        for guidance in (None, Guidance(SCALE, "score"))
    ]
    assert spread[1] < 0.5 * spread[0]


def test_best_of_n_is_the_best_of_n_plain_samples():
    result = sample_best_of_n(task(None, 4000, 4, transition="ode"), BestOfN(4))
    rewards = WORLD.reward(WORLD.flat(result.latents))
    plain = plain_rewards(16_000, transition="ode", seed=5).view(4000, 4).amax(1)
    error = (rewards.var() / 4000 + plain.var() / 4000) ** 0.5
    assert abs(rewards.mean() - plain.mean()) < 4 * error
    torch.testing.assert_close(result.rewards.amax(1), rewards.float())


def test_svdd_draws_nearer_to_the_tilt_with_more_proposals():
    """Draws by exp(scale V) follow the tilted transitions as M grows, where the chain reverses the forward process; one
    with less noise leaves some of the reward to the initial noise, and the best of M overshoots (documented biases).
    """
    value, target = OracleValue(WORLD, "soft", SCALE), WORLD.tilted(SCALE)
    wanted = WORLD.reward(target.sample(100_000, 3)).mean()

    def gap(proposals, scale=SCALE, transition=REVERSAL):
        result = sample_svdd(task(value, 2000, transition=transition, steps=80), SVDD(proposals, scale=scale))
        return (WORLD.reward(WORLD.flat(result.latents)).mean() - wanted).item()

    assert gap(1) < gap(2) - 0.2 < -0.2
    assert abs(gap(32)) < 0.08
    assert gap(32, transition="flow_grpo") < -0.15
    assert gap(32, scale=None) > 0.15


def test_search_and_proposals_raise_the_reward():
    value = OracleValue(WORLD, "expected")
    plain = plain_rewards(2000).mean()
    search = WORLD.reward(WORLD.flat(sample_search(task(value, 500, 2), Search(2, 4)).latents)).mean()
    assert search > plain + 0.3
    fk = [
        WORLD.reward(WORLD.flat(sample_fk(task(value, 500, 4), FK(4, num_proposals=m)).latents)).mean() for m in (1, 3)
    ]
    assert plain + 0.1 < fk[0] < fk[1] - 0.02


def test_search_stays_within_its_budget():
    calls = []

    class Counted(OracleValue):
        def value(self, latents, sigma, condition):
            calls.append(len(latents))
            return super().value(latents, sigma, condition)

    sample_search(task(Counted(WORLD), 50, 3, steps=10), Search(3, 2))
    assert 50 * 3 < sum(calls) <= 50 * (3 + 2 * 8)  # the first step's, and two for each of the others but the last


# -- evidence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposals", ["plain", "twisted"])
@pytest.mark.parametrize("kind", ["soft", "tweedie"])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_evidence_is_unbiased_over_a_thousand_runs(potential, kind, proposals):
    """Against the plain mean of exp(scale reward) over the same chain, which is unbiased too."""
    scale, chain = 0.25, {"steps": 10, "power": 1.0}
    options = FK(
        num_particles=16, potential=potential, scale=scale, ess_threshold=0.7, resample_window=(0, None),
        resample_every=3, guidance=Guidance(0.05) if proposals == "twisted" else None,
    )  # fmt: skip
    value = OracleValue(WORLD, kind, scale)
    estimates = sample_fk(task(value, 1000, 16, seed=7, **chain), options).log_evidence.exp()
    plain = (scale * plain_rewards(**chain)).exp()
    error = (estimates.var() / 1000 + plain.var() / len(plain)) ** 0.5
    assert abs(estimates.mean() - plain.mean()) < 4 * error
    assert 4 * error < 0.05 * plain.mean()


def test_tweedie_is_biased_before_the_last_event_as_theory_says():
    """Of latents at t = 0.7, soft values weigh what the rewards will (E exp V = E exp(scale r)); Tweedie's do not, and
    fall short of it for a linear reward, by Jensen: ``exp E <= E exp``.
    """
    world, t, scale = two_dimensional_world(quadratic=False), 0.7, 2.0
    clean = world.prior.sample(8000, seed=1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    latents = ((1 - t) * clean + t * noise).view(-1, *world.shape)
    truth = (scale * world.reward(world.prior.sample(400_000, seed=3))).exp().mean()
    found = {}
    for kind in ("soft", "tweedie"):
        weights = ParticleWeights(1000, 8, scale=scale)
        weights.update(OracleValue(world, kind, scale).value(latents, t, world.condition(8000)).view(1000, 8))
        estimates = weights.log_evidence.exp()
        found[kind] = (estimates.mean() - truth) / (estimates.std() / 1000**0.5)
    assert abs(found["soft"]) < 4
    assert found["tweedie"] < -10


# -- independence of the batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sample, options, particles",
    [
        (sample_dps, Guidance(0.2, window=(1, None)), 1),
        (sample_dps, Guidance(0.2, window=(1, None), every=3, between="last"), 1),
        (sample_fk, FK(3, 2, guidance=Guidance(0.1, window=(1, None))), 3),
        (sample_best_of_n, BestOfN(3, keep=((0.5, 2),)), 3),
        (sample_best_of_n, BestOfN(3, stop_above=0.5), 3),
        (sample_svdd, SVDD(3, scale=1.0), 1),
        (sample_search, Search(2, 3), 2),
    ],
)
def test_samples_do_not_depend_on_their_neighbours(sample, options, particles):
    """One sample alone, or all at once, DPS bit by bit. (At t = 1 the exact gradient is 0, and a relative strength
    would make rounding errors as long as the velocity.)
    """
    world = image_like_world()
    value = OracleValue(world, "expected")

    def run(samples, batch_size=None):
        generators = [torch.Generator().manual_seed(s) for s in samples]
        whole = sampling_task(
            world, value, len(samples), particles=particles, steps=12, transition="linear_sde",
            noise=Noise(generators, torch.device("cpu")),
            latents=world.noise(4 * particles, 3).view(4, particles, *world.shape)[samples].flatten(0, 1),
        )  # fmt: skip
        denoiser = whole.denoiser
        denoiser.batch_size = batch_size
        return sample(replace(whole, denoiser=denoiser), options)

    together, apart = run([0, 1, 2, 3]), run([0, 1, 2, 3], batch_size=1)
    assert torch.equal(apart.latents, torch.cat([run([s], batch_size=1).latents for s in range(4)]))
    torch.testing.assert_close(together.latents, apart.latents, rtol=1e-4, atol=1e-5)
    assert sample is not sample_dps or torch.equal(together.latents, apart.latents)
