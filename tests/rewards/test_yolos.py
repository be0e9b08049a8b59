"""YolosReward against transformers' YolosForObjectDetection and YolosImageProcessor, on a small random folder."""

from __future__ import annotations

import math

import pytest
import torch

from stitchvm_ext import load_reward
from stitchvm_ext.rewards.preprocessing import detector_size

from ..tiny import rewards as tiny
from .contract import assert_contract, assert_pixels_within_8_bits, images, pictures

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=[False, True], ids=["first positions", "positions between blocks"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("yolos")
    tiny.write_yolos(path, mid_positions=request.param)
    return path


@pytest.fixture(scope="module")
def yolos(folder):
    return transformers.YolosForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def probabilities(yolos, pixels):
    """[B, detections] of class 1."""
    return yolos(pixels).logits.softmax(-1)[..., 1]


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (64, 32)])
def test_contract(folder, yolos, size):
    """The position embeddings are for 32x48: the first and the last size have them resized."""
    reward = load_reward("yolos", folder, label="square", image_size=size)
    x = images(*size)
    p = probabilities(yolos, reward.preprocess(x))
    assert_contract(reward, x, torch.log(1 - (1 - p).prod(-1)))
    assert reward.num_prefix_tokens == 6 and reward.pooled_tokens == (1, 2, 3, 4, 5)
    with torch.no_grad():
        tokens = reward.output(x).tokens
        expected = yolos(reward.preprocess(x)).last_hidden_state
    torch.testing.assert_close(tokens[:, 1:6], expected[:, -5:], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, 6:], expected[:, 1:-5], atol=1e-5, rtol=0)


def test_count(folder, yolos):
    count = load_reward("yolos", folder, label="square", score_as="count")
    p = probabilities(yolos, count.preprocess(images())).sum(-1)
    assert_contract(count, images(), p)
    for target in (0, 1, 3.5):
        reward = load_reward("yolos", folder, label="square", score_as="count", target=target)
        distance = (p - target).abs()
        expected = -torch.where(distance < 1, distance.square() / 2, distance - 0.5)
        assert_contract(reward, images(), expected)


def test_presence_is_a_smooth_maximum_that_stays_finite(folder):
    reward = load_reward("yolos", folder, label="square")
    logits = torch.randn(1, 5, 6)
    for odds in (-200.0, -60.0, -10.0, 0.0, 10.0, 200.0):
        logits[0, :, 1] = odds
        logits[0, 2, 1] = odds + 1
        given = logits.clone().requires_grad_()
        reward.classifier.forward = lambda tokens, given=given: given
        score = reward.score(reward.output(images()[:1]))
        score.sum().backward()
        assert score.isfinite().all() and given.grad.isfinite().all()
        largest = logits.log_softmax(-1)[..., 1].amax()
        if -60 <= odds <= 0:
            assert largest - 1e-5 <= score <= min(0.0, largest + math.log(5)) + 1e-5
            assert given.grad[0, 2, 1] > 0
    del reward.classifier.forward


@pytest.mark.parametrize("size", [(64, 64), (50, 50), (90, 60), (61, 90), (40, 100)])
def test_preprocessing_equals_the_processors_within_8_bits(folder, size):
    reward = load_reward("yolos", folder, label=1, image_size=size)
    processor = transformers.YolosImageProcessor.from_pretrained(folder)
    expected = processor(pictures(images(*size)), return_tensors="pt")["pixel_values"]
    assert_pixels_within_8_bits(reward.preprocess(images(*size)), expected, reward.std, largest=4)


def test_same_size_is_only_normalised(folder):
    reward = load_reward("yolos", folder, label=1)
    processor = transformers.YolosImageProcessor.from_pretrained(folder)
    expected = processor(pictures(images()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(reward.preprocess(images()), expected, atol=1e-5, rtol=0)


def test_detector_size_is_transformers():
    from transformers.models.yolos.image_processing_yolos import get_size_with_aspect_ratio_yolos

    generator = torch.Generator().manual_seed(0)
    for height, width, shortest in torch.randint(17, 900, (500, 3), generator=generator).tolist():
        longest = shortest + height % 200
        for h, w in ((height, width), (shortest, max(shortest, width)), (max(height, shortest), shortest)):
            got = detector_size(h, w, shortest, longest)
            assert got == get_size_with_aspect_ratio_yolos((h, w), shortest, longest), (h, w, shortest, longest)


def test_errors(folder):
    reward = load_reward("yolos", folder, label=1)
    with pytest.raises(ValueError, match=r"brings to \(32, 32\), got \(32, 64\), which becomes \(16, 48\)"):
        reward(images(32, 64))
    with pytest.raises(ValueError, match="label: .*got 'cube'"):
        load_reward("yolos", folder, label="cube")
    with pytest.raises(ValueError, match="target: expected None unless score_as is 'count'"):
        load_reward("yolos", folder, label=1, target=2)
    with pytest.raises(ValueError, match="score_as: expected one of .*'presence'"):
        load_reward("yolos", folder, label=1, score_as="logit")
