"""Weights of particles: resampling, potentials, temperature."""

import math

import pytest
import torch

from stitchvm_ext.sampling.particles import (
    POTENTIALS,
    RESAMPLERS,
    ParticleWeights,
    effective_sample_size,
    scale_for_ess,
)

INF = math.inf
VALUES = torch.tensor([[[0.1, 0.5, -0.2, 0.3], [0.2, 0.1, 0.9, 0.0]], [[0.4, 0.2, 0.0, 0.6], [0.1, 0.8, 0.3, 0.2]]])
REWARDS = torch.tensor([[0.7, 0.1, 0.4, 0.2], [0.0, 0.3, 0.6, 0.5]])


@pytest.mark.parametrize("scheme", list(RESAMPLERS))
def test_copies_are_right_on_average_and_never_of_weight_zero(scheme):
    weights = torch.tensor([0.0, 0.45, 0.3, 0.0, 0.2, 0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    uniforms = torch.rand(draws, 6, generator=generator, dtype=torch.float64)
    copies = torch.stack([torch.bincount(RESAMPLERS[scheme](weights, u), minlength=6) for u in uniforms]).double()
    assert (copies.sum(1) == 6).all() and (copies[:, weights == 0] == 0).all()
    error = copies.std(0) / draws**0.5
    assert ((copies.mean(0) - 6 * weights).abs() <= 4 * error + 1e-9).all()
    if scheme != "multinomial":
        assert (copies >= (6 * weights).floor()).all()
    if scheme == "systematic":
        assert (copies <= (6 * weights).ceil()).all()


@pytest.mark.parametrize("scheme", ["systematic", "residual"])
def test_equal_weights_keep_everybody(scheme):
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    assert sorted(RESAMPLERS[scheme](weights, torch.full((5,), 0.7).double()).tolist()) == list(range(5))


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("scheme", list(RESAMPLERS))
def test_uniforms_at_the_edges(scheme, edge):
    weights = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    ancestors = RESAMPLERS[scheme](weights, torch.full((4,), edge, dtype=torch.float64))
    assert set(ancestors.tolist()) <= {1, 2}


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_whole_path_weighs_exp_of_the_reward(potential):
    """Also along ancestries: the last event divides by the product of a particle's past potentials."""
    weights = ParticleWeights(2, 4, potential, scale=3.0)
    uniforms = torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(1))
    for values, u in zip(VALUES, uniforms, strict=True):
        weights.update(values)
        ancestors = weights.resample(u, threshold=1.0)
        assert (weights.log_weights == 0).all() and ancestors.shape == (2, 4)
    weights.update(REWARDS, final=True)
    torch.testing.assert_close(weights.log_potential, 3.0 * REWARDS.double())


@pytest.mark.parametrize("potential", POTENTIALS)
def test_weights_are_carried_through_events_that_do_not_resample(potential):
    """The public code drops them there, which biases it."""
    weights = ParticleWeights(2, 4, potential, scale=0.5)
    for values in VALUES:
        weights.update(values)
        ancestors = weights.resample(torch.rand(2, 4), threshold=0.1)
        assert torch.equal(ancestors, torch.arange(4).repeat(2, 1))
    weights.update(REWARDS, final=True)
    torch.testing.assert_close(weights.log_weights, 0.5 * REWARDS.double())
    torch.testing.assert_close(weights.log_evidence, (0.5 * REWARDS.double()).exp().mean(1).log())


def test_potentials_by_hand():
    first, second = VALUES[:, :1]
    expected = {
        "diff": 2 * second,
        "max": 2 * first + 2 * torch.maximum(first, second),
        "sum": 2 * first + 2 * (first + second),
    }
    for potential, log_weight in expected.items():
        weights = ParticleWeights(1, 4, potential, scale=2.0)
        weights.update(first)
        weights.update(second)
        torch.testing.assert_close(weights.log_weights, log_weight.double())


def test_large_scales_do_not_saturate():
    """The public code clamps weights to 1e10, where scales above 23 stop to tell particles apart."""
    weights = ParticleWeights(1, 4, scale=1e5)
    weights.update(REWARDS[:1])
    assert (weights.resample(torch.rand(1, 4)) == REWARDS[0].argmax()).all()
    assert weights.log_evidence.isfinite().all()


# -- temperature by effective sample size ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
def test_the_scale_meets_the_effective_sample_size(target):
    scores = torch.randn(6, 16, generator=torch.Generator().manual_seed(2)).double() * torch.logspace(-9, 9, 6)[:, None]
    scale = scale_for_ess(scores, target)
    torch.testing.assert_close(effective_sample_size(scale[:, None] * scores), torch.full((6,), target * 16).double())


def test_the_unit_of_the_reward_does_not_matter():
    runs = []
    for unit in (1.0, 1e6, 1e-6):
        weights = ParticleWeights(2, 4, "max", target_ess=0.5)
        ancestors = []
        for values in VALUES:
            weights.update(unit * values)
            ancestors.append(weights.resample(torch.full((2, 4), 0.3), threshold=1.0))
        weights.update(unit * REWARDS, final=True)
        runs.append((torch.stack(ancestors), weights.log_weights))
    for ancestors, log_weights in runs[1:]:
        assert torch.equal(ancestors, runs[0][0])
        torch.testing.assert_close(log_weights, runs[0][1], rtol=1e-4, atol=1e-6)
    assert runs[0][0].unique().numel() > 1
    assert weights.log_evidence.isnan().all()  # there is no one temperature


# -- degenerate values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_ess", [None, 0.5])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_equal_values_weigh_nothing(potential, target_ess):
    weights = ParticleWeights(1, 4, potential, scale=5.0, target_ess=target_ess)
    for _ in range(2):
        weights.update(torch.full((1, 4), 0.3))
        assert torch.equal(weights.resample(torch.rand(1, 4), threshold=1.0), torch.arange(4)[None])
    assert effective_sample_size(weights.log_weights).item() == pytest.approx(4)


@pytest.mark.parametrize("target_ess", [None, 0.5])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_minus_infinity_rules_a_particle_out_for_good(potential, target_ess):
    weights = ParticleWeights(1, 4, potential, scale=2.0, target_ess=target_ess)
    weights.update(torch.tensor([[0.0, -INF, 0.1, 0.2]]))
    weights.update(torch.tensor([[0.0, 9.0, 0.1, 0.2]]))
    assert weights.log_weights[0, 1] == -INF and weights.log_weights[0, [0, 2, 3]].isfinite().all()
    assert 1 not in weights.resample(torch.rand(1, 4), threshold=1.0)


def test_values_that_no_weights_follow_from():
    weights = ParticleWeights(2, 2)
    with pytest.raises(FloatingPointError, match=r"value: .*NaN or \+inf in samples \[1\]"):
        weights.update(torch.tensor([[0.0, 1.0], [0.0, math.nan]]))
    with pytest.raises(FloatingPointError, match=r"samples \[0\]"):
        weights.update(torch.tensor([[INF, 1.0], [0.0, 0.0]]))
    with pytest.raises(FloatingPointError, match=r"every particle of samples \[1\] has weight 0"):
        weights.update(torch.tensor([[0.0, 1.0], [-INF, -INF]]))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"potential": "mean"}, ValueError, "potential.*'mean'"),
        ({"scale": -1.0}, ValueError, "scale.*-1"),
        ({"scale": "1"}, TypeError, "scale.*str"),
        ({"target_ess": 0.0}, ValueError, "target_ess.*0.0"),
        ({"target_ess": 1.5}, ValueError, "target_ess.*1.5"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ParticleWeights(1, 2, **options)
