"""The tensor preprocessing against open_clip's own transform of PIL pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stitchvm_ext.playground import world
from stitchvm_ext.rewards.preprocessing import preprocess, resized_size

open_clip = pytest.importorskip("open_clip")
Image = pytest.importorskip("PIL.Image")


def picture(height: int, width: int) -> np.ndarray:
    """A drawn picture cut or tiled to a size, with some noise: edges, flat ground and texture. uint8 [H, W, 3]."""
    rng = np.random.default_rng(height * 1000 + width)
    drawn = np.concatenate([world.sample(rng).image for _ in range(-(-width // world.SIZE))], axis=1)
    drawn = np.concatenate([drawn] * -(-height // world.SIZE))[:height, :width].astype(float)
    return (drawn + rng.normal(0, 12, drawn.shape)).clip(0, 255).astype(np.uint8)


def config(size, mode: str = "shortest", interpolation: str = "bicubic", fill_color: int = 0) -> dict:
    return {
        "size": size, "mode": "RGB", "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28),
        "interpolation": interpolation, "resize_mode": mode, "fill_color": fill_color,
    }  # fmt: skip


@pytest.mark.parametrize("height, width", [(64, 64), (96, 150), (151, 90), (40, 30), (33, 33)])
@pytest.mark.parametrize(
    "cfg",
    [
        config(48), config(48, "squash"), config(48, "longest", fill_color=90), config((32, 56)),
        config((32, 56), "squash"), config(48, interpolation="bilinear"), config(64),
    ],
    ids=["shortest", "squash", "longest", "shortest oblong", "squash oblong", "bilinear", "same size"],
)  # fmt: skip
def test_equals_open_clips_transform(cfg, height, width):
    pixels = picture(height, width)
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**cfg), is_train=False)
    expected = transform(Image.fromarray(pixels))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    got = preprocess(tensor, cfg)[0]
    assert got.shape == expected.shape and got.dtype == torch.float32
    error = (got - expected).abs() * torch.tensor(cfg["std"]).view(3, 1, 1) * 255  # in 8-bit steps
    # PIL rounds to 8 bits after each of its two passes, whose order depends on Pillow where the aspect ratio changes.
    oblong_squash = cfg["resize_mode"] == "squash" and cfg["size"] == (32, 56)
    assert error.max() <= (6 if oblong_squash else 1.2) and error.mean() <= 0.4
    assert error.flatten().quantile(0.99) <= 1.2


def test_same_size_only_normalises():
    x = torch.rand(2, 3, 20, 20)
    cfg = config(20)
    expected = (x - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    assert torch.equal(preprocess(x, cfg), expected)


def test_longer_side_is_rounded_as_each_library_rounds_it():
    assert resized_size(100, 151, (32, 32), "shortest") == (32, 48)  # torchvision: 48.32 truncated
    assert resized_size(100, 59, (32, 32), "shortest") == (54, 32)  # 54.2
    assert resized_size(100, 155, (32, 40), "shortest") == (32, 50)  # open_clip: 49.6 rounded
    assert resized_size(100, 155, (32, 40), "longest") == (26, 40)


def test_differentiable():
    x = torch.rand(1, 3, 23, 31, dtype=torch.float64).mul(0.4).add(0.3).requires_grad_()  # away from the clamp
    cfg = config(12)
    direction = torch.randn(1, 3, 23, 31, dtype=torch.float64)
    (grad,) = torch.autograd.grad(preprocess(x, cfg).square().sum(), x)
    step = 1e-2
    ahead, behind = (preprocess(x.detach() + s * direction, cfg).double().square().sum() for s in (step, -step))
    torch.testing.assert_close((ahead - behind) / (2 * step), (grad * direction).sum(), rtol=2e-3, atol=1e-2)
