"""Frozen weights split over two processes: the same training, on half of the weights."""

from __future__ import annotations

import pytest

from tests.training.build import build, comparable
from tests.training.test_exactness import logs_close
from tests.training.test_nft import assert_close, load, run


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("nft", "--stitched"), ("dpo", "--stitched"), ("draft", "--checkpoint")], ids=lambda options: options[0]
)
def test_split_weights_change_nothing(tmp_path, options):
    """Three prompts: the processes have different numbers of samples, of steps until the stop, and of passes."""
    options = ["--method", *options, "--prompts", 3, "--rollout-batch", 1, "--train-batch", 4, "--iterations", 2]
    run(tmp_path / "whole", tmp_path / "whole.pt", *options)
    run(tmp_path / "split", tmp_path / "split.pt", *options, "--shard", processes=2)
    whole, split = load(tmp_path / "whole.pt"), load(tmp_path / "split.pt")
    assert whole["held"] == 1 and split["held"] == pytest.approx(0.5, abs=0.01)
    logs_close(split["rows"], whole["rows"])
    assert_close(split["weights"], whole["weights"], rtol=1e-3, atol=1e-4)


def test_processes_wait_for_the_one_with_the_most_passes(tmp_path, monkeypatch):
    trainer = build(tmp_path)
    assert list(trainer.batches(range(5), 2)) == [([0, 1], True), ([2, 3], True), ([4], True)]
    assert list(trainer.batches([], 2)) == []
    trainer.sharded = True
    monkeypatch.setattr(trainer, "gather", lambda rows: [*rows, 4])  # another process has four
    assert list(trainer.batches(range(3), 2)) == [([0, 1], True), ([2], True), ([2], False), ([2], False)]
    assert list(trainer.batches([], 2, spare=7)) == [([7], False)] * 4


def test_one_process_has_all_weights(tmp_path):
    one = build(tmp_path, shard_frozen_weights=True, iterations=1)
    rows = one.train(progress=False)
    assert not one.sharded
    assert comparable(rows) == comparable(build(tmp_path / "plain", iterations=1).train(progress=False))
