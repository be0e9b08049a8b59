"""RewardSum: the formula, shared towers, calibration, the warning, and its use as a clean reward."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from open_clip.model import CLIP

from stitchvm_ext import MonteCarloValue, TweedieValue, stitch
from stitchvm_ext.backbones import Condition, backbone_of
from stitchvm_ext.playground import models
from stitchvm_ext.rewards import AestheticReward, OpenClipReward, RewardSum
from stitchvm_ext.rewards.scalar_head import ScalarHead
from tests import tiny

PROMPTS = ["a red circle", "two green triangles", "a small blue square", "a yellow ring"]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8},
    "text_cfg": {
        "context_length": models.MAX_TOKENS,
        "vocab_size": len(models.WORDS),
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}  # fmt: skip


def clip(seed: int = 0, **changes) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(seed)
    config = {**copy.deepcopy(CONFIG), **changes}
    return CLIP(**copy.deepcopy(config)), config


def tokenizer(texts):
    return models.tokenize(models.build_tokenizer(), list(texts))


def cosine(seed: int = 0, **changes) -> OpenClipReward:
    model, config = clip(seed, **changes)
    return OpenClipReward(model, tokenizer, config)


def aesthetic(seed: int = 0, **changes) -> AestheticReward:
    model, config = clip(seed, **changes)
    torch.manual_seed(7)
    head = ScalarHead({0: (16, 16), 2: (1, 16)}, "gelu")
    with torch.no_grad():
        head.layers[2].weight.mul_(1000)
    return AestheticReward(model, None, config, head)


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def count_passes(tower, call) -> int:
    passes = []
    handle = tower.conv1.register_forward_hook(lambda *args: passes.append(1))
    call()
    handle.remove()
    return len(passes)


@torch.no_grad()
def test_sum_is_the_weighted_normalised_sum():
    a, b = cosine(0), aesthetic(1)
    ra, rb = a(images(), PROMPTS), b(images())
    torch.testing.assert_close(RewardSum([(a, 2.0), (b, -0.5)])(images(), PROMPTS), 2 * ra - 0.5 * rb)
    normalised = RewardSum([(a, 2.0), (b, -0.5)], normalise=[(0.1, 0.03), (5.0, 4.0)])
    expected = 2 * (ra - 0.1) / 0.03 - 0.5 * (rb - 5) / 4
    torch.testing.assert_close(normalised(images(), PROMPTS), expected)
    assert normalised.weighted.factors == pytest.approx([2 / 0.03, -0.5 / 4])


@torch.no_grad()
def test_equal_towers_run_once():
    a, b, c = cosine(0), aesthetic(0), cosine(1)
    total = RewardSum([(a, 1.0), (b, 1.0), (c, 1.0)], normalise=[(0, 1)] * 3)
    assert total.towers == [0, 0, 2]
    for tower, passes in ((a.visual, 1), (b.visual, 0), (c.visual, 1)):
        assert count_passes(tower, lambda: total(images(), PROMPTS)) == passes
    separate = a(images(), PROMPTS) + b(images()) + c(images(), PROMPTS)
    torch.testing.assert_close(total(images(), PROMPTS), separate)


def squashed():
    reward = cosine(0)
    reward.preprocess_config = {**reward.preprocess_config, "resize_mode": "squash"}
    return reward


def nudged():
    reward = cosine(0)
    with torch.no_grad():
        reward.visual.ln_post.bias[0] += 1e-3
    return reward


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (lambda: cosine(0), True),
        (lambda: cosine(0, quick_gelu=True), False),
        (squashed, False),
        (nudged, False),
    ],
)
def test_what_counts_as_the_same_tower(other, shared):
    assert RewardSum([(aesthetic(0), 1.0), (other(), 1.0)]).towers == [0, 0 if shared else 1]


def test_gradient_is_the_sum_of_gradients():
    a, b = cosine(0), aesthetic(0)
    grads = []
    for reward in (RewardSum([(a, 3.0), (b, 0.5)]), a, b):
        x = images().requires_grad_()
        grads.append(torch.autograd.grad(reward(x, PROMPTS).sum(), x)[0])
    expected = 3 * grads[1] + 0.5 * grads[2]
    assert (grads[0] - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_calibrate_measures_and_normalises():
    a, b = cosine(0), aesthetic(1)
    x, prompts = images(20), [PROMPTS[k % 4] for k in range(20)]
    total = RewardSum([(a, 1.0), (b, 1.0)])
    pairs = total.calibrate(x, prompts, batch_size=7)
    for reward, (mean, std) in ((a, pairs[0]), (b, pairs[1])):
        scores = reward(x, prompts)
        assert (mean, std) == pytest.approx((scores.mean().item(), scores.std().item()), rel=1e-4)
    again = RewardSum([(a, 1.0), (b, 1.0)], normalise=pairs)
    assert torch.equal(again(x, prompts), total(x, prompts))
    assert total(x, prompts).mean().abs() < 1e-4


@torch.no_grad()
def test_warning_about_scales():
    a, b = cosine(0), aesthetic(0)
    apart = RewardSum([(a, 1.0), (b, 1.0)])
    spreads = [r(images(8), PROMPTS * 2).std() for r in (a, b)]
    assert spreads[1] > 20 * spreads[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apart(images(), PROMPTS)  # four scores: too few to say
        RewardSum([(a, 1.0), (b, 1.0)], [(0, 1), (0, 1)])(images(8), PROMPTS * 2)
        RewardSum([(a, (spreads[1] / spreads[0]).item()), (b, 1.0)])(images(8), PROMPTS * 2)
    with pytest.warns(UserWarning, match="OpenClipReward .*AestheticReward .*normalise each"):
        apart(images(), PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apart(images(8), PROMPTS * 2)  # once


def test_bad_terms():
    a = cosine(0)
    with pytest.raises(ValueError, match="at least one pair"):
        RewardSum([])
    with pytest.raises(TypeError, match="position 1"):
        RewardSum([(a, 1.0), (torch.nn.Identity(), 1.0)])
    with pytest.raises(ValueError, match="weight of term 0 .*finite"):
        RewardSum([(a, float("nan"))])
    with pytest.raises(ValueError, match="whole reward"):
        RewardSum([(a.suffix(2), 1.0)])
    with pytest.raises(ValueError, match="expected 1 pairs"):
        RewardSum([(a, 1.0)], normalise=[(0, 1), (0, 1)])
    with pytest.raises(ValueError, match="std > 0"):
        RewardSum([(a, 1.0)], normalise=[(0, 0)])
    with pytest.raises(ValueError, match="tells apart"):
        RewardSum([(a, 1.0)]).calibrate(images(1).expand(4, -1, -1, -1), ["a red circle"] * 4)
    with pytest.raises(ValueError, match="prompts: expected 4"):
        RewardSum([(a, 1.0)])(images(), PROMPTS[:2])


def test_a_sum_is_a_clean_reward_and_not_stitched(tmp_path):
    pipe = tiny.tiny_pipeline()
    a, b = cosine(0), aesthetic(0)
    total = RewardSum([(a, 1.0), (b, 2.0)], normalise=[(0.0, 0.1), (1.0, 5.0)])
    backbone = backbone_of(pipe)
    condition = Condition(tuple(PROMPTS[:2]), backbone.encode_text(pipe, PROMPTS[:2], max_sequence_length=0))
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    values = [TweedieValue(pipe, r).value_and_grad(z, 0.5, condition) for r in (total, a, b)]
    torch.testing.assert_close(values[0][0], 10 * values[1][0] + 0.4 * (values[2][0] - 1))
    torch.testing.assert_close(values[0][1], 10 * values[1][1] + 0.4 * values[2][1], rtol=1e-4, atol=1e-6)
    rollouts = [MonteCarloValue(pipe, r, 2, 2).rollout_rewards(z, 0.5, condition) for r in (total, a, b)]
    torch.testing.assert_close(rollouts[0], 10 * rollouts[1] + 0.4 * (rollouts[2] - 1))
    with pytest.raises(TypeError, match="RewardModel, got RewardSum; stitch each reward"):
        stitch(pipe, total, torch.rand(30, 3, 32, 32), work_dir=tmp_path)
