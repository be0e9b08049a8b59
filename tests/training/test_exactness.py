"""DRaFT and DPO: batches, processes, checkpointing, interruptions and kills change nothing."""

from __future__ import annotations

import pytest

from tests.training.build import build, comparable, weights
from tests.training.test_nft import assert_close, assert_equal, load, rows_close, run

CASES = [("draft", False), ("draft", True), ("dpo", False), ("dpo", True)]
cases = pytest.mark.parametrize(("method", "stitched"), CASES)


def logs_close(found, expected):
    """At iteration 1 policy and reference are equal: the margin's sign, and so the accuracy, is that of rounding. Later
    margins are small differences of errors, and less exact than other numbers.
    """
    for rows in (found, expected):
        rows[1].pop("accuracy", None)
        assert abs(rows[1].pop("margin", 0.0)) < 1e-3
    ours, theirs = ([row.pop("margin") for row in rows if "margin" in row] for rows in (found, expected))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    rows_close(found, expected)


@cases
def test_batch_sizes_and_checkpointing_do_not_change_a_step(tmp_path, method, stitched):
    settings = {"method": method, "stitched": stitched, "prompts_per_iteration": 3}
    one = build(tmp_path / "one", **settings)
    other = build(tmp_path / "other", **settings, train_batch_size=2, rollout_batch_size=2, gradient_checkpointing=True)
    logs_close(other.train(progress=False), one.train(progress=False))
    assert_close(weights(other), weights(one), rtol=1e-3, atol=1e-4)


@cases
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, method, stitched):
    whole = build(tmp_path / "whole", method=method, stitched=stitched)
    rows = whole.train(progress=False)
    for stop in (1, 2):
        build(tmp_path / "parts", method=method, stitched=stitched).train(stop_at=stop, progress=False)
    parts = build(tmp_path / "parts", method=method, stitched=stitched)
    assert comparable(parts.train(progress=False)) == comparable(rows)
    assert_equal(weights(parts), weights(whole))


@pytest.mark.parametrize(("method", "stitched"), [("draft", True), ("dpo", False)])
def test_two_processes_equal_one_with_accumulation(tmp_path, method, stitched):
    options = ["--method", method, *(["--stitched"] if stitched else [])]
    run(tmp_path / "one", tmp_path / "one.pt", "--train-batch", 2, "--rollout-batch", 3, *options)
    run(tmp_path / "two", tmp_path / "two.pt", "--train-batch", 8, *options, processes=2)
    one, two = load(tmp_path / "one.pt"), load(tmp_path / "two.pt")
    logs_close(two["rows"], one["rows"])
    assert_close(two["weights"], one["weights"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stitched"), [("draft", False), ("dpo", True)])
def test_ten_kills_end_with_the_weights_of_an_uninterrupted_run(tmp_path, method, stitched):
    options = ["--iterations", 20, "--method", method, *(["--stitched"] if stitched else [])]
    run(tmp_path / "whole", tmp_path / "whole.pt", *options)
    killed = run(tmp_path / "work", tmp_path / "never.pt", *options, "--kill-seed", 0).splitlines()
    assert len(killed) == 10 and all(line.startswith("killed=True") for line in killed), killed
    run(tmp_path / "work", tmp_path / "resumed.pt", *options)
    whole, resumed = load(tmp_path / "whole.pt"), load(tmp_path / "resumed.pt")
    assert comparable(resumed["rows"]) == comparable(whole["rows"])
    assert_equal(resumed["weights"], whole["weights"])
