"""Diffusion-DPO: the loss by hand, the pairs, what is noised."""

from __future__ import annotations

import math

import pytest
import torch

from stitchvm_ext.training import DPOConfig
from stitchvm_ext.training.dpo import rank_pairs
from stitchvm_ext.training.losses import dpo_loss
from tests.training.build import build


def test_the_loss_by_hand():
    """Winner: errors 1 and 4 with the model, 4 and 4 with the reference; loser: 9 and 1, then 1 and 1."""
    target = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    prediction = torch.tensor([[[2.0, 2.0], [3.0, 1.0]]], requires_grad=True)
    reference = torch.tensor([[[3.0, -2.0], [1.0, 3.0]]], requires_grad=True)
    loss, margin = dpo_loss(prediction, reference, target, dpo_beta=0.25)
    # d_w = 2.5 - 4 = -1.5, d_l = 5 - 1 = 4
    assert margin.item() == pytest.approx(0.25 * 5.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.25 * 5.5)))
    loss.backward()
    assert reference.grad is None
    # dloss/dy = (1 - sigmoid(margin)) beta (+ for the winner, - for the loser) 2 (y - y*) / 2 elements
    slope = 0.25 / (1 + math.exp(0.25 * 5.5))
    torch.testing.assert_close(prediction.grad, slope * torch.tensor([[[1.0, 2.0], [-3.0, 1.0]]]))


def test_at_the_reference_the_loss_is_log_2_and_far_from_it_finite():
    y, target = torch.randn(3, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 2, 4, 2, 2)
    loss, margin = dpo_loss(y, y, target, 2000.0)
    torch.testing.assert_close(loss, torch.full((3,), math.log(2)))
    assert not margin.any()
    worse = y.clone()
    worse[:, 0] += 10
    assert dpo_loss(worse, y, target, 1e5)[0].isfinite().all()


def test_pairs_are_the_best_with_the_worst_and_never_equals():
    rewards = torch.tensor([[0.1, 0.9, 0.5, 0.3], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 3.0]])
    assert rank_pairs(rewards, 1) == [(1, 0), (11, 10)]
    assert rank_pairs(rewards, 2) == [(1, 0), (2, 3), (11, 10)]


@pytest.mark.parametrize("stitched", [False, True])
@pytest.mark.parametrize("space", ["velocity", "anchor"])
def test_a_run_logs_margins_and_learns_its_pairs(tmp_path, stitched, space):
    trainer = build(
        tmp_path,
        method="dpo",
        stitched=stitched,
        space=space,
        group_size=4,
        pairs_per_group=2,
        levels_per_pair=2,
        dpo_beta=50.0,
    )
    rows = trainer.train(progress=False)
    expected = {"reward/mean", "gap", "pairs", "zero_variance", "loss", "margin", "accuracy", "gradient_norm", "drift"}
    assert expected <= rows[1].keys() and rows[1]["gap"] > 0 and rows[1]["pairs"] == 4
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # B = 0: the policy is the reference
    assert rows[1]["gradient_norm"] > 0 and rows[3]["drift"] > 0

    samples, pairs = keep_pairs(trainer)
    margins = []
    for _ in range(8):
        margins.append(trainer._backward(3, samples, pairs)["margin"].item())
        trainer.apply_gradients(3)
    assert margins[-1] > margins[0]  # the same pairs again: the policy tells winners from losers


def keep_pairs(trainer):
    """Samples and pairs of an iteration whose training step is left out."""
    kept = []
    backward = trainer._backward
    trainer._backward = lambda iteration, samples, pairs: (
        kept.append((samples, pairs)) or backward(iteration, samples, pairs)
    )
    trainer.iterate(3)
    trainer._backward = backward
    return kept[0]


@pytest.mark.parametrize("stitched", [False, True])
def test_both_of_a_pair_get_the_same_noise_and_level_above_tau(tmp_path, stitched, monkeypatch):
    from stitchvm_ext.training import dpo

    trainer = build(tmp_path, method="dpo", stitched=stitched, levels_per_pair=2)
    seen, bridge = [], dpo.bridge
    monkeypatch.setattr(dpo, "bridge", lambda *a: seen.append(a) or bridge(*a))
    trainer.iterate(0)
    assert seen
    for anchor, noise, tau, t in seen:
        assert torch.equal(noise[0::2], noise[1::2]) and torch.equal(t[0::2], t[1::2])
        assert torch.equal(tau[0::2], tau[1::2]) and (t > tau).all() and (tau > 0).all() == stitched
        assert not torch.equal(anchor[0::2], anchor[1::2])
        assert len({float(x.sum()) for x in noise[0::2]}) == len(noise) // 2


def test_equal_rewards_are_skipped_and_said(tmp_path):
    trainer = build(tmp_path, method="dpo")
    trainer.value.value = lambda latents, sigma, condition: torch.ones(len(latents))
    with pytest.warns(UserWarning, match="all rewards of every group are equal at iteration 0, which is skipped"):
        row = trainer.iterate(0)
    assert row["skipped"] == 1 and row["pairs"] == 0 and trainer.optimizer_steps == 0


def test_rewards_that_are_not_finite_stop_the_run(tmp_path):
    trainer = build(tmp_path, method="dpo")
    trainer.train(stop_at=1, progress=False)
    trainer.value.value = lambda latents, sigma, condition: torch.full((len(latents),), torch.nan)
    with pytest.raises(FloatingPointError, match="reward is not finite at iteration 1"):
        trainer.train(progress=False)
    assert build(tmp_path, method="dpo").iteration == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size: expected at least 2 samples to compare, got 1"),
        ({"pairs_per_group": 5}, "pairs_per_group: expected at most 4 of 8 samples, got 5"),
        ({"dpo_beta": 0.0}, "dpo_beta: expected a positive number, got 0.0"),
        ({"levels_per_pair": 11}, "levels_per_pair: expected at most the 10 steps"),
        ({"stop_window": (3, 7), "levels_per_pair": 4}, "levels_per_pair: expected at most the 3 steps"),
        ({"stop_window": (3, 11)}, "stop_window: expected"),
        ({"space": "x0"}, "space: expected one of"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**settings)
