"""What every reward has to keep, on images of one size."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from stitchvm_ext.rewards import RewardModel, reward_suffix_from_description

PROMPTS = ["a red circle", "two green triangles", "a small blue square and a yellow ring"]


def images(height: int = 32, width: int = 32, seed: int = 5) -> Tensor:
    """Three images of 8-bit values, [3, 3, H, W] in [0, 1]: smooth ground with edges and some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3, 3, 5, 5, generator=generator)
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    x = x + 0.05 * torch.randn(x.shape, generator=generator)
    return (x.clamp(0, 1) * 255).round() / 255


def pictures(x: Tensor) -> list:
    """PIL images of [B, 3, H, W]."""
    from PIL import Image

    return [Image.fromarray((i * 255).round().byte().permute(1, 2, 0).numpy()) for i in x]


def assert_pixels_within_8_bits(got: Tensor, expected: Tensor, std, largest: float = 1.5) -> None:
    """The references round to 8 bits after each pass of a resize: a step or so apart before normalisation."""
    assert got.shape == expected.shape
    steps = (got - expected).abs() * torch.tensor(std).view(3, 1, 1) * 255
    assert steps.max() <= largest and steps.mean() <= 0.4, (steps.max(), steps.mean())


def assert_contract(reward: RewardModel, x: Tensor, expected: Tensor) -> None:
    """Frozen; the cut exact at every block; suffixes small, trainable, and the same after their description; gradients
    reach the images.

    Args:
        expected: the scores by the library's own forward pass.
    """
    condition = reward.encode_condition(PROMPTS)
    tolerance = 1e-5 * max(1.0, expected.abs().max().item())
    assert not reward.training and not any(p.requires_grad for p in reward.parameters())
    with torch.no_grad():
        score = reward(x, PROMPTS)
        assert score.shape == (len(x),) and score.dtype == torch.float32
        assert (score - expected).abs().max() <= tolerance, (score, expected)
        layers = list(range(1, reward.num_layers + 1))
        entering = reward.entering_tokens(x, layers)
    patches = reward.grid[0] * reward.grid[1]
    for layer, tokens in entering.items():
        prefix = 0 if layer == 1 else reward.num_prefix_tokens
        assert tokens.shape == (len(x), prefix + patches, reward.width)
        suffix = reward.suffix(layer)
        description = json.loads(json.dumps(reward.describe()))
        rebuilt = reward_suffix_from_description(description, layer)
        rebuilt.load_state_dict(suffix.state_dict())
        assert type(rebuilt) is type(reward) and rebuilt.describe() == reward.describe()
        with torch.no_grad():
            for module in (suffix, rebuilt):
                output = module.requires_grad_(False).forward_from(tokens, layer)
                assert output.tokens.shape == (len(x), reward.num_prefix_tokens + patches, reward.width)
                assert (module.score(output, condition) - score).abs().max() <= tolerance
            assert torch.equal(
                suffix.forward_from(tokens, layer).embedding, rebuilt.forward_from(tokens, layer).embedding
            )
            assert_scored_by_pooled_tokens(suffix, tokens, layer, condition)

    sizes = [sum(p.numel() for p in reward_suffix_from_description(reward.describe(), j).parameters()) for j in layers]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert sizes[0] < sum(p.numel() for p in reward.parameters())
    suffix = reward.suffix(2)
    heads = {id(p) for p in suffix.head_parameters()}
    assert all(p.requires_grad != (id(p) in heads) for p in suffix.parameters())

    pixels = x.clone().requires_grad_()
    reward(pixels, PROMPTS).sum().backward()
    assert pixels.grad.isfinite().all() and (pixels.grad.flatten(1).norm(dim=1) > 0).all()


def assert_scored_by_pooled_tokens(suffix: RewardModel, tokens: Tensor, layer: int, condition) -> None:
    """Neither score nor embedding reads tokens that ``pooled_tokens`` leaves out."""
    if suffix.pooled_tokens is None:
        return
    output = suffix.forward_from(tokens, layer)
    expected = suffix.score(output, condition)
    others = [i for i in range(output.tokens.shape[1]) if i not in suffix.pooled_tokens]
    output.tokens[:, others] = torch.nan
    assert torch.equal(suffix.score(output, condition), expected)
