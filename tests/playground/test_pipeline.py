"""The pipeline class, the accuracy figures, and the shipped generator and rewards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stitchvm_ext import playground
from stitchvm_ext.playground import evaluate, models, world
from tests.tiny import tiny_pipeline


def test_texts_have_no_rows_of_a_missing_t5():
    from stitchvm_ext.playground.pipeline import PlaygroundPipeline

    stock = tiny_pipeline()
    ours = PlaygroundPipeline(**stock.components)
    texts = dict(prompt=["a red circle", "two green rings"], prompt_2=None, prompt_3=None)
    expected = stock.encode_prompt(**texts, max_sequence_length=0)
    for got in (ours.encode_prompt(**texts), ours.encode_prompt(**texts, max_sequence_length=256)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert expected[0].shape[1] == models.MAX_TOKENS
    assert stock.encode_prompt(**texts)[0].shape[1] == models.MAX_TOKENS + 256


def test_accuracy_counts_what_the_checker_sees():
    pictures = world.dataset(30, seed=9)
    images, captions = np.stack([p.image for p in pictures]), [p.caption for p in pictures]
    right = evaluate.checker_accuracy(images, captions)
    assert right["all"]["objects"] >= 0.95 and right["all"]["pictures"] == 30
    assert sum(right[kind]["pictures"] for kind in ("one", "count", "pair")) == 30
    images[:15] = 128
    half = evaluate.checker_accuracy(images, captions)
    assert abs(half["all"]["objects"] - 0.5) < 0.05 and abs(half["all"]["count"] - 0.5) < 0.05
    with pytest.raises(ValueError, match="captions: expected 30"):
        evaluate.checker_accuracy(images, captions[:3])


def test_shipped_generator_draws_what_held_out_captions_say():
    accuracy = evaluate.generator_accuracy(playground.load_pipeline(), evaluate.held_out_captions(16), steps=12)
    assert accuracy["all"]["colors"] >= 0.6 and accuracy["all"]["objects"] >= 0.4


@pytest.mark.parametrize("held_out", [False, True])
def test_shipped_rewards_tell_captions_apart(held_out):
    pictures = world.dataset(200, seed=10, held_out=True)
    rewards = [playground.load_reward(kind, held_out) for kind in ("clip", "aesthetic")]
    found = evaluate.reward_accuracy(*rewards, pictures)
    assert found["r_at_1"] >= 0.75 and found["aesthetic_r2"] >= 0.7
