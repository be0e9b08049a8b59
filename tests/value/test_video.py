"""A stitched value on a video backbone: every latent frame has a value, a video their mean."""

import pytest
import torch

from stitchvm_ext import StitchedValue, guided_sample, stitch
from stitchvm_ext.backbones import Condition, backbone_of
from stitchvm_ext.value import FinetuneConfig, MonteCarloValue, TweedieValue, search_stitch
from stitchvm_ext.value.base import score_images
from stitchvm_ext.value.stitching import untrained_value
from tests.tiny.rewards import tiny_clip
from tests.tiny.wan import tiny_wan

TEXT = {"max_sequence_length": 12}
PROMPTS = ("a red circle", "two blue squares")


@pytest.fixture
def reward(tmp_path):
    """From a folder, where a loaded value finds its text tower again."""
    return tiny_clip(tmp_path / "reward")


@pytest.fixture
def images():
    coarse = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=64, mode="bilinear")


@pytest.fixture
def make_value(reward, images):
    pipe = tiny_wan()
    backbone = backbone_of(pipe)
    null = backbone.null_condition(pipe, **TEXT)
    z = backbone.encode_images(pipe.vae, images)
    search = search_stitch(backbone, reward, z, images, null, layers=[1], progress=False)
    return lambda depth=2: untrained_value(pipe, reward, search, depth, 1, (8, 8), null, TEXT)


@pytest.fixture
def condition():
    pipe = tiny_wan()
    backbone = backbone_of(pipe)
    cond, uncond = (backbone.encode_text(pipe, texts, **TEXT) for texts in (list(PROMPTS), ["", ""]))
    return Condition(PROMPTS, cond, uncond, guidance_scale=3.0)


@pytest.fixture
def latents():
    return torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_values_of_frames_and_of_videos(make_value, condition, latents, reward):
    value = make_value()
    with torch.no_grad():
        frames = value.frame_values(latents, 0.4, condition)
        assert frames.shape == (2, 3)
        torch.testing.assert_close(value.value(latents, 0.4, condition), frames.mean(1))
        # Frame by frame through the layers themselves: tokens of frame f are rows 16f .. 16f + 15.
        tokens = value.backbone.features(latents, 0.4, condition.uncond, 2)
        assert tokens.shape == (2, 48, 32)
        for f in range(3):
            output = value(tokens[:, 16 * f : 16 * (f + 1)])
            torch.testing.assert_close(frames[:, f], reward.score(output, reward.encode_condition(PROMPTS)))


@pytest.mark.parametrize("depth", [0, 2])
def test_gradient_reaches_the_frames_that_a_value_reads(make_value, condition, latents, depth):
    """Without the backbone a frame's value reads that frame alone; in the backbone frames attend to each other."""
    value = make_value(depth)
    leaf = latents.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value.frame_values(leaf, 0.4, condition)[:, 1].sum(), leaf)
    reached = grad.abs().amax(dim=(1, 3, 4)) > 0
    assert reached.tolist() == [[depth > 0, True, depth > 0]] * 2
    whole, grad = value.value_and_grad(latents, 0.4, condition)
    assert whole.shape == (2,) and grad.shape == latents.shape and grad.dtype == torch.float32
    assert bool((grad.abs().amax(dim=(1, 3, 4)) > 0).all())


def test_shared_prefix_of_a_video(make_value, condition, latents):
    value = make_value()
    assert value.can_share(condition)
    cond, uncond, shared, grad = value.branches_with_value(latents, 0.4, condition)
    with torch.no_grad():
        expected_cond, expected_uncond = value.backbone.branches(latents, torch.tensor(0.4), condition)
    expected, expected_grad = value.value_and_grad(latents, 0.4, condition)
    for got, wanted in ((cond, expected_cond), (uncond, expected_uncond), (shared, expected), (grad, expected_grad)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_one_frame_is_an_image(make_value, condition, latents):
    value = make_value()
    frame = latents[:, :, :1]
    assert value.frame_values(frame, 0.4, condition).shape == (2, 1)
    assert value.value_and_grad(frame, 0.4, condition)[1].shape == frame.shape


def test_folder_gives_the_same_bits(make_value, condition, latents, tmp_path):
    value = make_value()
    value.save_pretrained(tmp_path / "value")
    loaded = StitchedValue.from_pretrained(tmp_path / "value", tiny_wan())
    for got, expected in zip(*(v.value_and_grad(latents, 0.4, condition) for v in (loaded, value)), strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(*(v.frame_values(latents, 0.4, condition) for v in (loaded, value)))


def test_guided_videos(make_value):
    """Guidance raises the value of what is sampled, and costs no further passes of the denoiser."""
    value = make_value()
    options = {"num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.0}
    generator = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    options |= {"output_type": "pt", "progress": False, "max_sequence_length": 12}
    plain = guided_sample(tiny_wan(), None, list(PROMPTS), generator=generator(), **options)
    guided = guided_sample(tiny_wan(), value, list(PROMPTS), generator=generator(), strength=0.3, **options)
    assert guided.images.shape == (2, 5, 3, 64, 64) and guided.latents.shape == (2, 4, 2, 8, 8)
    assert guided.values.shape == (4, 2) and bool(guided.values.isfinite().all())
    assert guided.evaluations.denoiser == plain.evaluations.denoiser == 4 * 2 * 2
    backbone = backbone_of(tiny_wan())
    condition = Condition(PROMPTS, backbone.encode_text(tiny_wan(), list(PROMPTS), **TEXT))
    with torch.no_grad():
        before, after = (value.value(out.latents, 0.0, condition) for out in (plain, guided))
    assert bool((after > before).all())


@pytest.mark.parametrize("transition", ["flow_grpo", "linear_sde"])
def test_guided_videos_with_noise(make_value, transition):
    """A sample does not depend on the others, in the noise of its steps neither."""
    options = {"num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0}
    options |= {"output_type": "latent", "progress": False, "max_sequence_length": 12, "transition": transition}
    value = make_value()
    generators = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]  # noqa: E731
    both = guided_sample(tiny_wan(), value, list(PROMPTS), generator=generators(1, 2), **options).images
    one = guided_sample(tiny_wan(), value, PROMPTS[1], generator=generators(2), **options).images
    torch.testing.assert_close(both[1:], one, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_baselines_score_every_decoded_frame(condition, latents, reward):
    pipe = tiny_wan()
    tweedie = TweedieValue(pipe, reward)
    backbone = tweedie.backbone
    with torch.no_grad():
        clean = latents - 0.4 * backbone.guided_velocity(latents, torch.tensor(0.4), condition)
        frames = backbone.decode_latents(pipe.vae, clean)
        assert frames.shape == (2, 3, 9, 64, 64)
        scores = [score_images(reward, frames[:, :, f], PROMPTS) for f in range(9)]
    value, grad = tweedie.value_and_grad(latents, 0.4, condition)
    torch.testing.assert_close(value, torch.stack(scores).mean(0))
    assert grad.shape == latents.shape
    rollouts = MonteCarloValue(pipe, reward, num_rollouts=2, num_steps=2)
    assert rollouts.value(latents, 0.4, condition).shape == (2,)


def test_stitching_learns_from_single_frames(reward, images, tmp_path):
    value = stitch(
        tiny_wan(), reward, images, depth=2, layer=1, work_dir=tmp_path / "work", probe_images=8,
        config=FinetuneConfig(epochs=1, batch_size=4), text_options=TEXT, progress=False,
    )  # fmt: skip
    backbone = value.backbone
    condition = Condition(PROMPTS, backbone.encode_text(tiny_wan(), list(PROMPTS), **TEXT))
    assert value.frame_values(torch.randn(2, 4, 3, 8, 8), 0.5, condition).shape == (2, 3)
