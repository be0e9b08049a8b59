"""ValueSum: one prefix for all, the weighted sum of the separate values and gradients, mixtures, and its use."""

from __future__ import annotations

import copy

import pytest
import torch

from stitchvm_ext import MonteCarloValue, RewardSum, TweedieValue, ValueSum, guided_sample
from stitchvm_ext.backbones import Condition, backbone_of
from stitchvm_ext.value import search_stitch
from stitchvm_ext.value.stitching import untrained_value
from tests import tiny

WEIGHTS = (2.0, -0.5, 4.0)  # powers of two: float32 rounding in a score commutes with them


@pytest.fixture(scope="module")
def values():
    """Stitched values at depths 2, 3 and 3, entering at 1, 2 and 1, with different weights."""
    pipe, reward = tiny.tiny_pipeline(), tiny.tiny_reward()
    backbone = backbone_of(pipe)
    null = backbone.null_condition(pipe, max_sequence_length=0)
    coarse = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")
    z = backbone.encode_images(pipe.vae, images)
    search = search_stitch(backbone, reward, z, images, null, layers=[1, 2], progress=False)
    cuts = [(2, 1), (3, 2), (3, 1)]
    return [untrained_value(pipe, reward, search, *cut, (16, 16), null, {"max_sequence_length": 0}) for cut in cuts]


def block_calls(value, call) -> list[int]:
    """Samples that went through each block, over all calls."""
    rows = [0] * value.backbone.depth

    def counter(number):
        def count(module, args, kwargs, output):
            rows[number] += output[1].shape[0]

        return count

    handles = [b.register_forward_hook(counter(n), with_kwargs=True) for n, b in enumerate(value.backbone.blocks)]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return rows


def weighted(parts):
    return sum(w * part for w, part in zip(WEIGHTS, parts, strict=True))


def assert_near(got, expected, tolerance):
    assert (got - expected).norm() <= tolerance * expected.norm()


def total_of(values):
    return ValueSum(list(zip(values, WEIGHTS, strict=True)), normalise=[(0.0, 1.0)] * 3)


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_value_and_gradient_are_the_weighted_sums(values, latents, condition, memory, monkeypatch):
    for value in values:
        monkeypatch.setattr(value, "memory", memory)
    total = total_of(values)
    parts = [v.value_and_grad(latents, 0.5, condition) for v in values]
    got = total.value_and_grad(latents, 0.5, condition)
    assert_near(got[0], weighted(p[0] for p in parts), 1e-5)
    assert_near(got[1], weighted(p[1] for p in parts), 1e-5)
    assert_near(total.value(latents, 0.5, condition), got[0], 1e-6)


def test_gradient_in_double(values, latents, condition):
    double = [copy.deepcopy(value).double() for value in values]
    backbone = backbone_of(copy.deepcopy(values[0].backbone.denoiser).double())
    for value in double:
        object.__setattr__(value, "backbone", backbone)
    total, z = total_of(double), latents.double()

    def gradient(value):  # before value_and_grad rounds it to float32
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(value.value(leaf, 0.5, condition).sum(), leaf)[0]

    expected = weighted(gradient(value) for value in double)
    assert expected.dtype == torch.float64
    assert_near(gradient(total), expected, 1e-12)


def test_exactly_one_prefix(values, latents, condition):
    total = total_of(values)
    assert total.depths == [2, 3]
    assert block_calls(total, lambda: total.value_and_grad(latents, 0.5, condition)) == [2, 2, 2, 0]
    assert block_calls(total, lambda: total.value(latents, 0.5, condition)) == [2, 2, 2, 0]
    one_depth = ValueSum([(values[1], 1.0), (values[2], 1.0)])
    assert block_calls(one_depth, lambda: one_depth.value_and_grad(latents, 0.5, condition)) == [2, 2, 2, 0]


def test_guidance_shares_the_unconditional_branch(values, latents, condition):
    total = total_of(values)
    with torch.no_grad():
        plain = block_calls(total, lambda: total.backbone.guided_velocity(latents, 0.6, condition))
        velocity = total.backbone.guided_velocity(latents, 0.6, condition)
    assert block_calls(total, lambda: total.denoise_with_value(latents, 0.6, condition)) == plain == [4, 4, 4, 4]
    got = total.denoise_with_value(latents, 0.6, condition)
    assert_near(got[0], velocity, 1e-4)
    expected = total.value_and_grad(latents, 0.6, condition)
    assert_near(got[1], expected[0], 1e-5)
    assert_near(got[2], expected[1], 1e-5)


def test_another_negative_prompt_runs_its_own_prefix(values, pipe, latents, condition):
    total = total_of(values)
    uncond = total.backbone.encode_text(pipe, ["a blue ring"] * 2, max_sequence_length=0)
    other = Condition(condition.prompts, condition.cond, uncond, guidance_scale=3.0)
    assert block_calls(total, lambda: total.denoise_with_value(latents, 0.6, other)) == [6, 6, 6, 4]
    assert_near(
        total.denoise_with_value(latents, 0.6, other)[2], total.value_and_grad(latents, 0.6, condition)[1], 1e-5
    )


def test_normalised_as_a_sum_of_rewards(values, latents, condition):
    pairs = [(0.1, 0.5), (-0.2, 0.25), (0.0, 2.0)]
    total = ValueSum(list(zip(values, WEIGHTS, strict=True)), normalise=pairs)
    parts = [v.value_and_grad(latents, 0.5, condition) for v in values]
    v, grad = total.value_and_grad(latents, 0.5, condition)
    assert_near(v, weighted((p[0] - mean) / std for p, (mean, std) in zip(parts, pairs, strict=True)), 1e-5)
    assert_near(grad, weighted(p[1] / std for p, (_, std) in zip(parts, pairs, strict=True)), 1e-5)


def test_other_estimators_run_by_themselves(values, pipe, reward, latents, condition):
    tweedie = TweedieValue(pipe, RewardSum([(reward, 1.0)]))
    total = total_of([values[0], tweedie, values[1]])
    assert total.shared == [0, 2] and total.separate == [1]
    parts = [v.value_and_grad(latents, 0.5, condition) for v in (values[0], tweedie, values[1])]
    for got in (total.value_and_grad(latents, 0.5, condition), total.branches_with_value(latents, 0.5, condition)[2:]):
        assert_near(got[0], weighted(p[0] for p in parts), 1e-5)
        assert_near(got[1], weighted(p[1] for p in parts), 1e-5)
    only = ValueSum([(tweedie, 1.0)])
    assert_near(only.denoise_with_value(latents, 0.5, condition)[2], parts[1][1], 1e-5)
    rollouts = MonteCarloValue(pipe, reward, 1, 1)
    with_rollouts = ValueSum([(values[0], 1.0), (rollouts, 1.0)])
    assert with_rollouts.value(latents, 0.5, condition).shape == (2,)
    with pytest.raises(TypeError, match="no gradient"):
        with_rollouts.value_and_grad(latents, 0.5, condition)


def test_values_with_another_null_text_do_not_share(values, latents, condition):
    other = copy.deepcopy(values[0])
    object.__setattr__(other, "backbone", values[0].backbone)
    other.null_prompt_embeds.mul_(-1)
    total = ValueSum([(values[1], 1.0), (other, 1.0)])
    assert total.shared == [0] and total.separate == [1]
    expected = values[1].value(latents, 0.5, condition) + other.value(latents, 0.5, condition)
    assert_near(total.value(latents, 0.5, condition), expected, 1e-5)


def test_guided_sampling(values, pipe):
    options = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0, "strength": 0.2}
    options |= {"output_type": "pt", "progress": False}
    images = [
        guided_sample(pipe, value, ["a red circle"], generator=torch.Generator().manual_seed(0), **options).images
        for value in (ValueSum([(values[0], 1.0)]), values[0], total_of(values))
    ]
    torch.testing.assert_close(images[0], images[1], rtol=1e-3, atol=1e-4)
    assert (images[2] - images[1]).abs().max() > 1e-3


def test_bad_terms(values, reward):
    with pytest.raises(ValueError, match="at least one pair"):
        ValueSum([])
    with pytest.raises(TypeError, match="position 1"):
        ValueSum([(values[0], 1.0), (reward, 1.0)])
    elsewhere = copy.deepcopy(values[1])
    object.__setattr__(elsewhere, "backbone", backbone_of(tiny.tiny_transformer()))
    with pytest.raises(ValueError, match="one denoiser, got another one at position 1"):
        ValueSum([(values[0], 1.0), (elsewhere, 1.0)])
    with pytest.raises(ValueError, match="latents of"):
        ValueSum([(values[0], 1.0)]).check_latent_size((8, 8))
