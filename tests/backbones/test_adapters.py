"""What every backbone adapter must do, on a small pipeline of each family."""

from __future__ import annotations

import copy

import pytest
import torch

from stitchvm_ext import guided_sample
from stitchvm_ext.backbones import backbone_of, expand_rows, expand_sigma, stack_rows
from stitchvm_ext.backbones.latents import encode_images
from tests.tiny.catalogue import PIPELINES

SIGMA = torch.tensor([0.3, 0.8])
PROMPTS = ["a red circle", "two blue rings"]


def assert_rounded(got, expected):
    """Equal up to the rounding of fused blocks and of batches of another size."""
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))


class Family:
    def __init__(self, pipe):
        self.pipe, self.backbone = pipe, backbone_of(pipe)
        b = self.backbone
        self.frames = 2 if b.is_video else 1
        size = b.latent_size(pipe, *getattr(pipe, "test_size", (None, None)))
        self.image_size = tuple(side * b.pixel_factor(pipe) for side in size)
        shape = (2, b.latent_channels, *((self.frames,) if b.is_video else ()), *size)
        self.latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.encoding = b.encode_text(pipe, PROMPTS)

    def tokens_per_image(self, depth: int) -> int:
        h, w = self.backbone.grid(tuple(self.latents.shape[-2:]), depth)
        return h * w * self.frames


@pytest.fixture(params=list(PIPELINES), scope="module")
def family(request):
    return Family(PIPELINES[request.param]())


def test_features_are_the_blocks_own_output(family):
    b = family.backbone
    depths = list(range(1, b.depth + 1))
    own = {}
    handles = [
        block.register_forward_hook(
            lambda m, args, out, depth=depth: own.update({depth: b.image_tokens(out, family.latents, depth)})
        )
        for depth, block in enumerate(b.blocks[: b.depth], 1)
    ]
    with torch.no_grad():
        b.denoiser(**b.call_inputs(family.latents, SIGMA, family.encoding), return_dict=False)
        for handle in handles:
            handle.remove()
        several = b.features_at(family.latents, SIGMA, family.encoding, depths)
    assert sorted(several) == depths
    for depth in depths:
        assert several[depth].shape == (2, family.tokens_per_image(depth), b.width(depth))
        assert_rounded(several[depth], own[depth])
        with torch.no_grad():
            assert_rounded(b.features(family.latents, SIGMA, family.encoding, depth), own[depth])


def test_features_stop_after_the_last_kept_block(family):
    b = family.backbone
    ran = []
    handles = [
        block.register_forward_pre_hook(lambda m, args, n=number: ran.append(n))
        for number, block in enumerate(b.blocks)
    ]
    with torch.no_grad():
        b.features(family.latents, SIGMA, family.encoding, 1)
    for handle in handles:
        handle.remove()
    assert ran == [0]


def test_tokens_are_row_major_frame_by_frame(family):
    """A change of the latent in one corner of a frame changes a token there the most (convolutions may shift it)."""
    b = family.backbone
    (height, width), (h, w) = family.latents.shape[-2:], b.grid(tuple(family.latents.shape[-2:]), 1)
    changed = family.latents.clone()
    corner = changed[..., height - height // h :, : width // w]
    corner = corner[:, :, -1] if b.is_video else corner
    corner += 5 * torch.randn(corner.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        before, after = (b.features(z, SIGMA, family.encoding, 1) for z in (family.latents, changed))
    change = (after - before).norm(dim=-1).view(2, family.frames, h, w)
    for sample in change:
        frame, row, column = (int(i) for i in torch.unravel_index(sample.argmax(), sample.shape))
        assert frame == family.frames - 1 and row >= h - 2 and column <= 1


def test_half_precision(family):
    """The denoiser takes what it is given in bfloat16, and says nearly the same."""
    b = family.backbone
    half = type(b).from_pipe(family.pipe, copy.deepcopy(b.denoiser).to(torch.bfloat16))
    sigma, encoding = torch.tensor([0.25, 0.5]), dict(family.encoding)  # times and guidance without rounding
    if "guidance" in encoding:
        encoding["guidance"] = torch.full((2,), 4.0)
    velocity, tokens, _ = half.velocity_and_features(family.latents, sigma, encoding, 1)
    assert tokens.dtype == torch.bfloat16
    with torch.no_grad():
        exact = b.velocity(family.latents, sigma, encoding)
    assert (velocity.float() - exact).norm() < 0.05 * exact.norm()


def test_samples_do_not_mix(family):
    """The gradient of one sample's tokens lies on its own latent, and everywhere on it after the last cut."""
    b = family.backbone
    leaf = family.latents.clone().requires_grad_()
    tokens = b.features(leaf, SIGMA, family.encoding, b.depth)
    (grad,) = torch.autograd.grad(tokens[1].square().sum(), leaf)
    assert not grad[0].any()
    assert (grad[1] != 0).float().mean() > 0.9


def test_shared_prefix_gives_the_plain_velocity_and_gradient(family):
    b = family.backbone
    for depth in {1, b.depth}:
        velocity, tokens, leaf = b.velocity_and_features(family.latents, SIGMA, family.encoding, depth)
        with torch.no_grad():
            plain = b.velocity(family.latents, SIGMA, family.encoding)
        assert velocity.shape == family.latents.shape
        assert_rounded(velocity, plain)
        other = family.latents.clone().requires_grad_()
        expected = b.features(other, SIGMA, family.encoding, depth)
        assert_rounded(tokens, expected)
        weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
        (shared_grad,) = torch.autograd.grad((tokens * weights).sum(), leaf)
        (plain_grad,) = torch.autograd.grad((expected * weights).sum(), other)
        assert_rounded(shared_grad, plain_grad)


def test_texts_of_different_length_stack(family):
    """A row beside a longer text means what it means alone: padding is masked out, or has one length for all."""
    b = family.backbone
    texts = ["a ring", "two large blue rings left of a small red circle"]
    alone = [b.encode_text(family.pipe, [text]) for text in texts]
    both = stack_rows(alone)
    with torch.no_grad():
        together = b.velocity(family.latents, SIGMA, both)
        for row, encoding in enumerate(alone):
            one = slice(row, row + 1)
            assert_rounded(together[one], b.velocity(family.latents[one], SIGMA[one], encoding))


def test_text_and_noise_level_reach_the_velocity(family):
    b = family.backbone
    null = expand_rows(b.null_condition(family.pipe), 2)
    with torch.no_grad():
        velocity = b.velocity(family.latents, SIGMA, family.encoding)
        assert not torch.allclose(velocity, b.velocity(family.latents, SIGMA, null), atol=1e-6)
        assert not torch.allclose(velocity, b.velocity(family.latents, SIGMA.flip(0), family.encoding), atol=1e-6)


def test_unguided_samples_are_the_pipelines_own(family):
    b = family.backbone
    height, width = family.image_size
    options = {"num_inference_steps": 3, "output_type": "np", "height": height, "width": width}
    if b.is_video:
        options["num_frames"] = 1 + family.pipe.vae_scale_factor_temporal
    generators = lambda: [torch.Generator().manual_seed(s) for s in (5, 6)]  # noqa: E731
    family.pipe.set_progress_bar_config(disable=True)
    expected = family.pipe(prompt=PROMPTS, generator=generators(), **pipeline_options(family), **options)
    expected = getattr(expected, "frames", None) if b.is_video else expected.images
    ours = guided_sample(
        family.pipe, None, PROMPTS, guidance_scale=4.0, generator=generators(), progress=False, **options
    )
    torch.testing.assert_close(torch.as_tensor(ours.images), torch.as_tensor(expected), rtol=1e-3, atol=2e-3)


def pipeline_options(family) -> dict:
    """What the pipeline is called with beyond the usual for guidance 4; None for an option that it does not have."""
    options = {"guidance_scale": 4.0, **getattr(family.pipe, "test_options", {})}
    return {name: value for name, value in options.items() if value is not None}


def test_images_are_encoded_as_the_pipeline_decodes_them(family):
    """decode(encode(x)) is the autoencoder's own reconstruction of its posterior mode."""
    b, vae = family.backbone, family.pipe.vae
    h, w = family.image_size
    images = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(3))
    z = b.encode_images(vae, images)
    assert z.shape[:2] == (2, b.latent_channels) and z.shape[-2:] == tuple(family.latents.shape[-2:])
    decoded = b.decode_latents(vae, z)
    assert decoded.shape[-2:] == (h, w)
    assert torch.equal(z, encode_images(vae, images).view_as(z))


def test_noisy_latents_denoise_to_clean_ones_at_level_zero(family):
    """Where there is no noise the process keeps the latent: what the model reads at sigma 0 is z_0 itself."""
    b = family.backbone
    zero = torch.zeros(2)
    process = b.process
    assert_rounded(process.model_latents(family.latents, zero), family.latents)
    back = process.flow_latents(process.model_latents(family.latents, SIGMA), SIGMA)
    assert_rounded(back, family.latents)
    assert expand_sigma(SIGMA, family.latents).ndim == family.latents.ndim


def test_sizes_that_do_not_fit_are_refused(family):
    b = family.backbone
    factor = b.pixel_factor(family.pipe)
    if factor > 1:
        with pytest.raises(ValueError, match=f"height: expected a multiple of {factor}"):
            b.latent_size(family.pipe, height=factor * 4 + 1)
    with pytest.raises(ValueError, match="latents: expected shape"):
        b.features(family.latents[:, :1], SIGMA, family.encoding, 1)
