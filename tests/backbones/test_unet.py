"""What the shared tests of adapters do not see in U-Nets: cuts of different grids, SDXL's empty text, other models."""

from __future__ import annotations

import copy

import pytest
import torch

from stitchvm_ext.backbones import backbone_of
from tests.tiny.catalogue import PIPELINES


@pytest.mark.parametrize("size", [(16, 16), (13, 10), (7, 18)])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_grids_of_odd_sizes(name, size):
    """A convolution of stride 2 keeps the last odd row; the up blocks undo it."""
    pipe = PIPELINES[name]()
    b = backbone_of(pipe)
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    encoding = b.encode_text(pipe, ["a ring"])
    found = b.features_at(latents, 0.5, encoding, [1, 2, 3])
    assert b.grid(size, 0) == size
    for depth, tokens in found.items():
        h, w = b.grid(size, depth)
        assert tokens.shape == (1, h * w, b.width(depth))
    velocity, tokens, _ = b.velocity_and_features(latents, 0.5, encoding, 2)
    with torch.no_grad():
        torch.testing.assert_close(velocity, b.velocity(latents, 0.5, encoding))


def test_tokens_are_the_positions_row_by_row():
    """The token at (row 1, column 2) of the first cut depends most on the latents under it."""
    pipe = PIPELINES["sdxl"]()  # no attention in the first block
    b = backbone_of(pipe)
    leaf = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = b.features(leaf, 0.5, b.null_condition(pipe), 1)
    rows, columns = b.grid((16, 16), 1)
    assert (rows, columns) == (8, 8)
    (grad,) = torch.autograd.grad(tokens[0, columns + 2].sum(), leaf)
    strength = grad[0].abs().sum(0)
    windows = torch.nn.functional.avg_pool2d(strength[None], 4, 2, padding=1)[0]  # [8, 8], a token's surroundings
    assert divmod(int(windows.argmax()), columns) == (1, 2)


def test_the_prefix_is_a_part_of_the_unet_itself():
    b = backbone_of(PIPELINES["sd15"]())
    shell = b.truncated(2)
    own = {id(p) for p in b.denoiser.parameters()}
    assert {id(p) for p in shell.parameters()} < own
    assert len(b.denoiser.down_blocks) == 3 and b.denoiser.mid_block is not None
    with pytest.raises(ValueError, match="expected a number of kept blocks in 1..3, got 4"):
        b.truncated(4)


def test_the_empty_text_of_sdxl_is_the_pipelines_own_unconditional_one():
    pipe = PIPELINES["sdxl"]()
    texts = backbone_of(pipe).encode_negative(pipe, ["", "a ring"])
    prompt, negative, pooled, negative_pooled = pipe.encode_prompt("a ring", device="cpu")
    torch.testing.assert_close(texts["prompt_embeds"], torch.cat([negative, prompt]))
    torch.testing.assert_close(texts["pooled_prompt_embeds"], torch.cat([negative_pooled, pooled]))
    assert not negative.any() and not negative_pooled.any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 9}, "as many input channels as the 4 output channels, got 9"),
        ({"time_cond_proj_dim": 8}, r"expected time_cond_proj_dim to be one of \[None\], got 8"),
        ({"class_embed_type": "timestep"}, "expected class_embed_type"),
    ],
)
def test_unets_of_other_inputs_are_refused(config, message):
    pipe = copy.copy(PIPELINES["sd15"]())
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config, **config)
    with pytest.raises(ValueError, match=message):
        backbone_of(pipe)


def test_gradient_against_finite_differences_in_double():
    """Through the skip connections' block outputs and the model's own coordinates."""
    pipe = PIPELINES["sd15"]()
    b = backbone_of(pipe)
    b = type(b)(copy.deepcopy(pipe.unet).double(), b.process, pipe.vae_scale_factor)
    encoding = {name: rows.double() for name, rows in b.null_condition(pipe).items()}
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for depth in (1, 2, 3):
        _, tokens, leaf = b.velocity_and_features(z, 0.6, encoding, depth)
        generator = torch.Generator().manual_seed(depth)
        weights = torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
        direction = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        (grad,) = torch.autograd.grad((tokens * weights).sum(), leaf)
        with torch.no_grad():
            ahead, behind = (b.features(z + s * 1e-4 * direction, 0.6, encoding, depth) for s in (1, -1))
        slope = ((ahead - behind) * weights).sum() / 2e-4
        torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-4, atol=1e-4)
