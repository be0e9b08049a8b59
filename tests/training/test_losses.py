"""The maths of the trainers: advantages, DiffusionNFT's loss, the bridge, in a world with closed forms."""

from __future__ import annotations

import pytest
import torch

from stitchvm_ext.training.advantages import group_advantages, optimality, zero_variance
from stitchvm_ext.training.bridge import bridge, bridge_velocity, predicted_anchor, training_levels
from stitchvm_ext.training.losses import nft_loss, old_policy_decay, velocity_distance
from tests.oracle import two_dimensional_world


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


# -- advantages --------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 3.0], [0.0, 10.0], [4.0, 4.0]])
    by_prompt = group_advantages(rewards, "prompt")
    expected = torch.tensor([[-1 / 1.0001, 1 / 1.0001], [-5 / 5.0001, 5 / 5.0001], [0.0, 0.0]])
    torch.testing.assert_close(by_prompt, expected)
    std = rewards.std(correction=0).item()
    expected = torch.tensor([[-1.0, 1.0], [-5.0, 5.0], [0.0, 0.0]]) / (std + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, "global"), expected)
    assert zero_variance(rewards).tolist() == [False, False, True]


def test_optimality_is_clipped_to_a_probability():
    advantages = torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0])
    assert optimality(advantages, 5.0).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("copy", {0: 0.0, 500: 0.0}),
        ("linear", {0: 0.0, 100: 0.1, 499: 0.499, 900: 0.5}),
        ("delayed", {75: 0.0, 76: 0.0075, 175: 0.75, 900: 0.999}),
    ],
)
def test_decays_are_the_published_ones(schedule, expected):
    for step, decay in expected.items():
        assert old_policy_decay(schedule, step) == pytest.approx(decay)


# -- DiffusionNFT's loss -----------------------------------------------------------------------------------------------


def gradient(prediction, *rest, **options):
    leaf = prediction.clone().requires_grad_()
    nft_loss(leaf, *rest, **options).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("mix_beta", [0.1, 1.0, 3.0])
def test_the_gradient_at_the_old_policy_is_2r_minus_1_whatever_beta(mix_beta):
    old, target = randn(5, 4, 3, 3), randn(5, 4, 3, 3, seed=1)
    r = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    found = gradient(old, old, target, r, mix_beta=mix_beta, adaptive=False)
    expected = (2 * r - 1).view(5, 1, 1, 1) * 2 * (old - target) / 36
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    # With adaptive weights it is the same direction, scaled sample by sample by the mean absolute error.
    found = gradient(old, old, target, r, mix_beta=mix_beta, adaptive=True)
    weights = (old - target).abs().flatten(1).mean(1).view(5, 1, 1, 1)
    torch.testing.assert_close(found, expected / weights, rtol=1e-5, atol=1e-8)


def test_the_loss_at_the_old_policy_does_not_depend_on_the_reward():
    old, target = randn(3, 8), randn(3, 8, seed=1)
    losses = [nft_loss(old, old, target, torch.full((3,), r), 1.0) for r in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


@pytest.mark.parametrize("mix_beta", [0.5, 1.0, 2.0])
def test_the_minimiser_is_old_plus_2r_minus_1_of_the_way_to_the_target_over_beta(mix_beta):
    old, target, r = randn(4, 6), randn(4, 6, seed=1), torch.tensor([0.0, 0.3, 0.6, 1.0])
    best = old + (2 * r - 1).view(4, 1) * (target - old) / mix_beta
    assert gradient(best, old, target, r, mix_beta=mix_beta, adaptive=False).abs().max() < 1e-6


def test_adaptive_weights_by_hand():
    prediction, old, target = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0]])
    # beta 0.5: y+ = (2, 1), y- = (0, 1); mean squares 2.5 and 0.5, mean absolute errors 1.5 and 0.5
    found = nft_loss(prediction, old, target, torch.tensor([0.75]), 0.5)
    assert found.item() == pytest.approx((0.75 * 2.5 / 1.5 + 0.25 * 0.5 / 0.5) / 0.5)
    same = nft_loss(target, target, target, torch.tensor([0.5]), 0.5)
    assert same.item() == 0  # no error: the weight is bounded below


def test_velocity_distance_differentiates_its_first_argument_alone():
    velocity, reference = randn(2, 4).requires_grad_(), randn(2, 4, seed=1).requires_grad_()
    distance = velocity_distance(velocity, reference)
    torch.testing.assert_close(distance, (velocity - reference).square().mean(1))
    distance.sum().backward()
    assert reference.grad is None and velocity.grad is not None


# -- the bridge --------------------------------------------------------------------------------------------------------


def test_at_tau_0_the_bridge_is_the_plain_flow():
    clean, noise = randn(6, 4, 2, 2), randn(6, 4, 2, 2, seed=1)
    t, tau = torch.linspace(0.05, 1.0, 6), torch.zeros(6)
    mix = t.view(6, 1, 1, 1)
    torch.testing.assert_close(bridge(clean, noise, tau, t), (1 - mix) * clean + mix * noise)
    torch.testing.assert_close(bridge_velocity(clean, noise, tau, t), noise - clean)


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.7])
def test_the_velocity_is_the_paths_derivative(tau):
    anchor, noise = (randn(1, 8, seed=k).double() for k in (0, 1))
    tau = torch.tensor([tau], dtype=torch.float64)
    for t in torch.linspace(float(tau) + 0.02, 0.99, 5, dtype=torch.float64):
        after, before = (bridge(anchor, noise, tau, t.view(1) + d) for d in (1e-6, -1e-6))
        torch.testing.assert_close(
            bridge_velocity(anchor, noise, tau, t.view(1)), (after - before) / 2e-6, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.7])
def test_the_bridge_continues_the_forward_process(tau):
    """From z_tau ~ p_tau it leads to p_t: mean and covariance of ``(1-t) z_0 + t eps``."""
    world = two_dimensional_world(quadratic=False)
    clean = world.prior.sample(200_000, 0)
    anchor = (1 - tau) * clean + tau * randn(*clean.shape, seed=1).double()
    t = torch.full((len(clean),), 0.85, dtype=torch.float64)
    z = bridge(anchor, randn(*clean.shape, seed=2).double(), torch.full_like(t, tau), t)
    torch.testing.assert_close(z.mean(0), 0.15 * world.prior.mean, rtol=0, atol=0.01)
    cov = 0.15**2 * world.prior.cov + 0.85**2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(z.T.cov(), cov, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("t", [0.65, 0.9])
def test_the_bridges_field_is_the_flows_own(tau, t):
    """``E[u* | z_t]``, regressed on samples, equals ``E[eps - z_0 | z_t]`` in closed form, for every tau."""
    world = two_dimensional_world(quadratic=False)
    count = 400_000
    clean = world.prior.sample(count, 0)
    anchor = (1 - tau) * clean + tau * randn(*clean.shape, seed=1).double()
    noise = randn(*clean.shape, seed=2).double()
    times = torch.full((count,), tau, dtype=torch.float64), torch.full((count,), t, dtype=torch.float64)
    z = bridge(anchor, noise, *times)
    # The residual to the flow's field has mean 0 given z_t, so it is uncorrelated with any function of z_t.
    residual = bridge_velocity(anchor, noise, *times) - world.velocity(z, t)
    for probe in (torch.ones_like(z), z, z.square(), z.flip(1), (2 * z).sin(), z.prod(1, keepdim=True).tanh()):
        products = residual * probe
        deviations = products.mean(0).abs() / (products.std(0) / count**0.5)
        assert deviations.max() < 4.5, deviations


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.7])
def test_the_target_velocity_predicts_its_own_anchor(tau):
    anchor, noise = (randn(4, 3, 2, 2, seed=k).double() for k in (0, 1))
    taus, t = torch.full((4,), tau, dtype=torch.float64), torch.linspace(tau + 1e-6, 1, 4, dtype=torch.float64)
    z = bridge(anchor, noise, taus, t)
    found = predicted_anchor(z, bridge_velocity(anchor, noise, taus, t), taus, t)
    torch.testing.assert_close(found, anchor, rtol=1e-7, atol=1e-7)


def test_at_tau_0_anchor_space_is_x0_space():
    z, velocity, old, clean = (randn(5, 4, 2, 2, seed=k) for k in range(4))
    t, r = torch.linspace(0.1, 1, 5), torch.linspace(0, 1, 5)
    anchors = [predicted_anchor(z, u, torch.zeros(5), t) for u in (velocity, old)]
    estimates = [z - t.view(5, 1, 1, 1) * u for u in (velocity, old)]
    torch.testing.assert_close(nft_loss(*anchors, clean, r, 0.7), nft_loss(*estimates, clean, r, 0.7))


def test_anchor_space_takes_the_singularity_at_tau_away():
    """Near tau the velocity's target is as large as 1/s; in anchor space error and gradient go to 0."""
    anchor, noise, velocity = (randn(2, 64, seed=k).double() for k in range(3))
    tau, r = torch.full((2,), 0.5, dtype=torch.float64), torch.tensor([0.2, 0.8])
    sizes = []
    for gap in (1e-1, 1e-4, 1e-8):
        t = tau + gap
        z = bridge(anchor, noise, tau, t)
        u = velocity.clone().requires_grad_()
        nft_loss(
            predicted_anchor(z, u, tau, t), predicted_anchor(z, velocity, tau, t), anchor, r, 1.0, False
        ).sum().backward()
        target = bridge_velocity(anchor, noise, tau, t)
        sizes.append((target.abs().max().item(), u.grad.abs().max().item()))
    assert sizes[2][0] > 1e3 > 30 * sizes[0][0]
    assert sizes[0][1] > sizes[1][1] > sizes[2][1] and sizes[2][1] < 1e-6


def test_training_levels_are_different_and_above_tau():
    sigmas = torch.linspace(1, 0, 26)
    for stop in (1, 12, 25):
        found = training_levels(sigmas, stop, max(1, int(0.99 * stop)), torch.Generator().manual_seed(0))
        assert len(found.unique()) == len(found) == max(1, int(0.99 * stop))
        assert (found > sigmas[stop]).all()
