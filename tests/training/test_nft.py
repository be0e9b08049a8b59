"""DiffusionNFT, clean and stitched: what an iteration does, exactness under splits, kills and resumes."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch

from stitchvm_ext.training import CleanReward, NFTConfig
from stitchvm_ext.training.lora import adapter_parameters
from stitchvm_ext.training.rewards import scores_by_term
from tests import tiny
from tests.programs import run_program
from tests.training.build import build, comparable, stitched_value, weights

run = functools.partial(run_program, Path(__file__).parent / "nft_run.py")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def rows_close(found, expected, rel=1e-4):
    for a, b in zip(comparable(found), comparable(expected), strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-6)


# -- an iteration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stitched", [False, True])
@pytest.mark.parametrize("space", ["anchor", "velocity"])
def test_a_run_logs_what_health_is_read_from(tmp_path, stitched, space):
    rows = build(tmp_path, stitched=stitched, space=space, kl_weight=0.1, advantage_std="prompt").train(progress=False)
    expected = {
        "reward/mean", "reward/std_within", "zero_variance", "loss", "policy_loss", "kl", "gradient_norm",
        "policy_change", "old_decay", "drift", "rollout_seconds", "train_seconds", "seconds",
    }  # fmt: skip
    assert all(expected <= row.keys() for row in rows[1:])
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-9) and rows[1]["policy_change"] == pytest.approx(0, abs=1e-4)
    assert rows[3]["kl"] > 0 and rows[3]["drift"] > rows[1]["drift"] > 0


def test_the_old_policy_follows_the_schedule(tmp_path):
    """ "copy" is the trained policy; "linear" keeps s thousandths of what it was after s optimiser steps."""
    copied = build(tmp_path / "copy", old_decay="copy")
    copied.train(progress=False)
    mine, old = (copied.adapter_state(name) for name in ("default", "old"))
    assert_equal(old, mine)
    followed = build(tmp_path / "linear", old_decay="linear", updates_per_iteration=2)
    followed.train(stop_at=1, progress=False)
    before = {name: {k: t.clone() for k, t in followed.adapter_state(name).items()} for name in ("default", "old")}
    followed.train(stop_at=2, progress=False)
    assert followed.optimizer_steps == 4
    mine = followed.adapter_state("default")
    assert_close(
        followed.adapter_state("old"), {k: 0.004 * t + 0.996 * mine[k] for k, t in before["old"].items()}, rtol=1e-5,
        atol=1e-7,
    )  # fmt: skip


def test_no_reference_pass_without_its_weight(tmp_path, monkeypatch):
    for weight, expected in ((0.0, False), (0.1, True)):
        trainer = build(tmp_path / str(weight), kl_weight=weight)
        seen = []
        velocity = trainer.base.velocity
        monkeypatch.setattr(trainer.base, "velocity", lambda *a, f=velocity, s=seen: s.append(1) or f(*a))
        trainer.train(stop_at=1, progress=False)
        assert bool(seen) == expected


def test_stitched_rollouts_stop_early_and_decode_nothing(tmp_path, monkeypatch):
    trainer = build(tmp_path, stitched=True)
    monkeypatch.setattr(type(trainer.base), "decode_latents", None)
    levels, collected = [], []
    losses, collect = trainer._losses, trainer._collect
    monkeypatch.setattr(
        trainer, "_losses", lambda *a: levels.append((a[1].tau[[k for k, _ in a[2]]], a[3])) or losses(*a)
    )
    monkeypatch.setattr(trainer, "_collect", lambda *a: collected.append(collect(*a)) or collected[-1])
    for iteration in range(3):
        trainer.iterate(iteration)
    stops = [stop for samples in collected for stop in samples.stops]
    assert set(stops) <= {2, 3, 4} and len(set(stops)) > 1
    for samples in collected:
        assert samples.stops[:3] == samples.stops[:1] * 3  # one stop per group
        assert torch.equal(samples.tau, trainer.sigmas[samples.stops])
    assert all((t > tau).all() for tau, t in levels)


def test_the_value_is_the_frozen_models_and_all_its_terms_read_one_prefix(tmp_path, monkeypatch):
    """After training the value is what it was, to the bit: the adapter does not reach it."""
    trainer = build(tmp_path, stitched=True, depths=(1, 3))
    condition = trainer.encode(["a ring", "two red rings"])
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    untouched = stitched_value(copy.deepcopy(tiny.tiny_pipeline()), 1, 3).value(latents, 0.4, condition)
    trainer.train(progress=False)
    assert max(p.abs().max() for n, p in trainer.adapter_state("default").items() if "lora_B" in n) > 0
    passes = []
    run_prefix = trainer.base.run_prefix
    monkeypatch.setattr(trainer.base, "run_prefix", lambda *a: passes.append(1) or run_prefix(*a))
    total, terms = scores_by_term(trainer.value, latents, 0.4, condition)
    assert torch.equal(total, untouched) and len(passes) == 1
    assert [name.split("_")[0] for name in terms] == ["0", "1"]
    torch.testing.assert_close(sum(terms.values()), total)


def test_guided_rollouts_train_the_conditional_branch(tmp_path, monkeypatch):
    plain, guided = build(tmp_path / "1", guidance_scale=1.0), build(tmp_path / "3", guidance_scale=3.0)
    samples = [trainer._collect(0, trainer.next_prompts(2)) for trainer in (plain, guided)]
    assert not torch.allclose(samples[0].anchors, samples[1].anchors, atol=1e-2)
    sizes = []
    velocity = guided.policy.velocity
    monkeypatch.setattr(guided.policy, "velocity", lambda z, t, e: sizes.append((len(z), len(t))) or velocity(z, t, e))
    row = guided.iterate(0)
    assert row["loss"] > 0 and all(size[0] == size[1] <= 8 for size in sizes)


def test_bf16_trains_float32_adapters_on_bf16_weights(tmp_path):
    pipe = copy.deepcopy(tiny.tiny_pipeline())
    pipe.transformer.to(torch.bfloat16)
    reward = tiny.tiny_reward()
    from stitchvm_ext.training import NFTTrainer
    from tests.training.build import COMMON, PROMPTS

    config = NFTConfig(**COMMON, mixed_precision="bf16", gradient_checkpointing=True)
    trainer = NFTTrainer(
        pipe, CleanReward(pipe, reward), PROMPTS, config, output_dir=tmp_path, held_out={"clip": reward},
        eval_prompts=["a ring"],
    )  # fmt: skip
    rows = trainer.train(progress=False)
    assert all(p.dtype == torch.float32 for p in trainer.parameters.values())
    assert trainer.policy.dtype == torch.bfloat16 and rows[-1]["drift"] > 0
    exact = build(tmp_path / "exact").train(progress=False)
    assert rows[1]["loss"] == pytest.approx(exact[1]["loss"], rel=0.05)


def test_checkpointing_does_not_change_a_step(tmp_path):
    plain = build(tmp_path / "plain", stitched=True, gradient_checkpointing=False)
    saved = build(tmp_path / "saved", stitched=True, gradient_checkpointing=True)
    rows_close(plain.train(progress=False), saved.train(progress=False))
    assert_close(weights(saved), weights(plain), rtol=1e-3, atol=1e-5)


# -- batches, kills, processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stitched", [False, True])
def test_batch_sizes_do_not_change_a_step(tmp_path, stitched):
    settings = {"stitched": stitched, "updates_per_iteration": 2}
    one = build(tmp_path / "one", **settings)
    other = build(tmp_path / "other", **settings, train_batch_size=3, rollout_batch_size=2)
    rows_close(one.train(progress=False), other.train(progress=False))
    assert_close(weights(other), weights(one), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stitched", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, stitched):
    whole = build(tmp_path / "whole", stitched=stitched)
    rows = whole.train(progress=False)
    for stop in (1, 2):
        build(tmp_path / "parts", stitched=stitched).train(stop_at=stop, progress=False)
    parts = build(tmp_path / "parts", stitched=stitched)
    assert comparable(parts.train(progress=False)) == comparable(rows)
    assert_equal(weights(parts), weights(whole))


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("stitched", [False, True])
def test_two_processes_equal_one_with_twice_the_passes(tmp_path, stitched):
    options = ["--stitched"] if stitched else []
    # Rollouts in batches as large as a process's share: AdamW makes much of the rounding of gradients near 0.
    run(tmp_path / "one", tmp_path / "one.pt", "--train-batch", 4, "--rollout-batch", 3, *options)
    run(tmp_path / "two", tmp_path / "two.pt", "--train-batch", 8, *options, processes=2)
    one, two = load(tmp_path / "one.pt"), load(tmp_path / "two.pt")
    rows_close(two["rows"], one["rows"])
    assert_close(two["weights"], one["weights"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_ten_kills_end_with_the_weights_of_an_uninterrupted_run(tmp_path):
    options = ["--iterations", 20, "--stitched"]
    run(tmp_path / "whole", tmp_path / "whole.pt", *options)
    killed = run(tmp_path / "work", tmp_path / "never.pt", *options, "--kill-seed", 0).splitlines()
    assert len(killed) == 10 and all(line.startswith("killed=True") for line in killed), killed
    steps = [int(line.split("step=")[1]) for line in killed]
    assert steps == sorted(steps) and 0 < steps[-1] < 20, steps
    run(tmp_path / "work", tmp_path / "resumed.pt", *options)
    whole, resumed = load(tmp_path / "whole.pt"), load(tmp_path / "resumed.pt")
    assert comparable(resumed["rows"]) == comparable(whole["rows"])
    assert_equal(resumed["weights"], whole["weights"])


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class Constant(CleanReward):
    """A reward that tells nothing apart, or that breaks."""

    number = 1.0

    def value(self, latents, sigma, condition):
        return torch.full((len(latents),), self.number)


def test_equal_rewards_are_skipped_and_said(tmp_path):
    pipe = copy.deepcopy(tiny.tiny_pipeline())
    trainer = build(tmp_path)
    trainer.value = Constant(pipe, tiny.tiny_reward())
    before = {k: p.clone() for k, p in adapter_parameters(trainer.policy.denoiser).items()}
    with pytest.warns(UserWarning, match="all rewards of every group are equal at iteration 0, which is skipped"):
        rows = trainer.train(stop_at=1, progress=False)
    assert rows[1]["skipped"] == 1 and rows[1]["zero_variance"] == 1 and trainer.optimizer_steps == 0
    assert_equal(adapter_parameters(trainer.policy.denoiser), before)


def test_rewards_and_losses_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
    trainer = build(tmp_path)
    trainer.train(stop_at=1, progress=False)
    trainer.value = Constant(trainer.pipe, tiny.tiny_reward())
    trainer.value.number = float("nan")
    with pytest.raises(FloatingPointError, match="reward is not finite at iteration 1"):
        trainer.train(progress=False)
    again = build(tmp_path)
    assert again.iteration == 1
    velocity = again.policy.velocity
    monkeypatch.setattr(again.policy, "velocity", lambda *a: velocity(*a) * torch.nan)
    with pytest.raises(FloatingPointError, match="the velocity_change is not finite at iteration 1"):
        again.train(progress=False)
    assert build(tmp_path).iteration == 1


def test_a_clean_reward_reads_clean_latents_alone(tmp_path):
    with pytest.raises(ValueError, match=r"stop_window: expected None with a clean reward, .* got \(2, 4\)"):
        build(tmp_path, stop_window=(2, 4))
    trainer = build(tmp_path)
    with pytest.raises(ValueError, match="sigma: a clean reward reads clean latents alone, expected 0, got 0.4"):
        trainer.value.value(torch.zeros(1, 4, 16, 16), 0.4, trainer.encode(["a ring"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size: expected at least 2 samples to compare, got 1"),
        ({"mix_beta": 0.0}, "mix_beta: expected a positive number, got 0.0"),
        ({"stop_window": (4, 12)}, r"stop_window: expected \(first, last\) steps .* <= 10 .*, got \(4, 12\)"),
        ({"stop_window": (0, 3)}, "stop_window: expected"),
        ({"solver": "heun"}, "solver: expected one of .* got 'heun'"),
        ({"space": "x1"}, r"space: expected one of \['anchor', 'velocity'\], got 'x1'"),
        ({"old_decay": "cosine"}, "old_decay: expected one of"),
        ({"kl_weight": -1.0}, "kl_weight: expected at least 0, got -1.0"),
        ({"timestep_fraction": 0.0}, r"timestep_fraction: expected a share in \(0, 1\], got 0.0"),
        ({"updates_per_iteration": 2000}, "updates_per_iteration: expected at most the 1152 samples, got 2000"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NFTConfig(**settings)
