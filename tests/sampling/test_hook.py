"""The pipeline's own, unchanged call under apply_value_guidance."""

import pytest
import torch

from stitchvm_ext import TweedieValue, apply_value_guidance, guided_sample, remove_value_guidance
from tests import tiny

PROMPTS = ["a small red circle", "two blue squares"]
STEPS = 4


@pytest.fixture(autouse=True)
def clean(pipe):
    yield
    remove_value_guidance(pipe.transformer)


@pytest.fixture
def call(pipe, seeds):
    def call(numbers=(0, 1), prompts=PROMPTS, **options):
        options = {"num_inference_steps": STEPS, "output_type": "latent", "max_sequence_length": 0, **options}
        return pipe(prompts, generator=seeds(*numbers), **options).images

    return call


@pytest.fixture
def reference(pipe, seeds):
    def reference(value, numbers=(0, 1), prompts=PROMPTS, **options):
        options = {
            "num_inference_steps": STEPS,
            "output_type": "latent",
            "max_sequence_length": 0,
            "progress": False,
            **options,
        }
        return guided_sample(pipe, value, prompts, generator=seeds(*numbers), **options)

    return reference


@pytest.mark.parametrize(
    "guidance, options",
    [
        ({"strength": 0.3}, {"guidance_scale": 4.0}),
        ({"strength": 0.3}, {"guidance_scale": 1.0}),
        ({"strength": 300.0, "mode": "score", "window": (1, 4), "every": 2}, {"guidance_scale": 4.0}),
        ({"strength": 300.0, "mode": "raw", "schedule": "alpha"}, {"guidance_scale": 4.0}),
        ({"strength": 0.3}, {"guidance_scale": 4.0, "negative_prompt": ["three green squares"] * 2}),
    ],
)
def test_equal_to_guided_sample(pipe, stitched, call, reference, guidance, options):
    plain = call(**options)
    guide = apply_value_guidance(
        pipe.transformer, stitched, PROMPTS, guidance_scale=options["guidance_scale"], **guidance
    )
    hooked = call(**options)
    remove_value_guidance(pipe.transformer)
    expected = reference(stitched, **options, **guidance)
    torch.testing.assert_close(hooked, expected.latents, rtol=0, atol=2e-4)
    assert (plain - hooked).abs().max() > 0.02
    guided = ~expected.values.isnan().any(1)
    torch.testing.assert_close(torch.stack([v for _, v in guide.values]), expected.values[guided], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor([s for s, _ in guide.values]), expected.sigmas[:-1][guided])


def test_the_tilt_does_not_depend_on_the_guidance_scale_it_was_told(pipe, stitched, call, reference):
    """Both halves lose c grad V, so in the raw and score modes only the pipeline's own guidance scale matters."""
    apply_value_guidance(pipe.transformer, stitched, PROMPTS, guidance_scale=2.0, strength=300.0, mode="raw")
    hooked = call(guidance_scale=6.0)
    remove_value_guidance(pipe.transformer)
    expected = reference(stitched, guidance_scale=6.0, strength=300.0, mode="raw").latents
    torch.testing.assert_close(hooked, expected, rtol=0, atol=2e-4)
    assert (hooked - call(guidance_scale=6.0)).abs().max() > 0.02


def test_several_images_per_prompt_and_calls_in_sequence(pipe, stitched, call, reference):
    apply_value_guidance(pipe.transformer, stitched, PROMPTS, guidance_scale=3.0, strength=0.3, window=(0, 3))
    call(guidance_scale=3.0)
    hooked = call(numbers=range(4), num_images_per_prompt=2, guidance_scale=3.0)
    remove_value_guidance(pipe.transformer)
    expected = reference(
        stitched, numbers=range(4), num_images_per_prompt=2, guidance_scale=3.0, strength=0.3, window=(0, 3)
    )
    torch.testing.assert_close(hooked, expected.latents, rtol=0, atol=2e-4)


def test_prefix_is_shared_where_it_can_be(pipe, stitched, call, block_rows):
    apply_value_guidance(pipe.transformer, stitched, PROMPTS, guidance_scale=3.0, strength=0.3)
    call(guidance_scale=3.0)
    assert block_rows == [2] * (STEPS * 4 * 2)  # half batches, as many as the plain call has
    block_rows.clear()
    call(guidance_scale=3.0, negative_prompt=["three green squares"] * 2)
    assert sum(block_rows) == STEPS * (4 * 4 + 2 * 2)  # the plain call's, and the value's own prefix


def test_any_estimator(pipe, reward, call, reference):
    value = TweedieValue(pipe, reward)
    apply_value_guidance(pipe.transformer, value, PROMPTS, guidance_scale=3.0, strength=0.2)
    hooked = call(guidance_scale=3.0)
    remove_value_guidance(pipe.transformer)
    torch.testing.assert_close(hooked, reference(value, guidance_scale=3.0, strength=0.2).latents, rtol=0, atol=2e-4)


def test_skip_layer_guidance_keeps_the_same_tilt(pipe, stitched, call):
    """Skip-layer guidance adds a difference of two outputs; the value's term must not enter it."""
    options = {
        "guidance_scale": 3.0,
        "num_inference_steps": 2,
        "skip_guidance_layers": [1],
        "skip_layer_guidance_stop": 1.0,
    }
    strength = 1e5  # the second of two steps has sigma 0.009
    apply_value_guidance(
        pipe.transformer, stitched, PROMPTS, guidance_scale=3.0, strength=strength, mode="raw", window=(1, 2)
    )
    hooked = call(**options)
    remove_value_guidance(pipe.transformer)
    states = []
    plain = call(**options, callback_on_step_end=lambda p, i, t, kw: (states.append(kw["latents"]), {})[1])
    sigma = pipe.scheduler.sigmas[1].item()
    _, grad = stitched.value_and_grad(states[0], sigma, reference_condition(pipe, stitched))
    moved = sigma * strength * grad
    assert moved.abs().max() > 0.02
    torch.testing.assert_close(hooked - plain, moved, rtol=1e-3, atol=1e-5)


def reference_condition(pipe, value):
    from stitchvm_ext.backbones import Condition

    return Condition(tuple(PROMPTS), value.backbone.encode_text(pipe, PROMPTS, max_sequence_length=0))


def test_removal_restores_the_pipeline_bit_by_bit(pipe, stitched, call):
    before = call(guidance_scale=3.0)
    apply_value_guidance(pipe.transformer, stitched, PROMPTS, guidance_scale=3.0)
    assert not torch.equal(call(guidance_scale=3.0), before)
    remove_value_guidance(pipe.transformer)
    remove_value_guidance(pipe.transformer)  # again: nothing to do
    assert torch.equal(call(guidance_scale=3.0), before)


def test_return_dict(pipe, stitched):
    apply_value_guidance(pipe.transformer, stitched, PROMPTS[0], guidance_scale=3.0)
    encoding = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in stitched.null_condition.items()}
    z = torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1)
    arguments = (z, encoding["prompt_embeds"], encoding["pooled_prompt_embeds"], torch.full((2,), 700.0))  # by position
    sample = pipe.transformer(*arguments).sample
    (tensor,) = pipe.transformer(*arguments, return_dict=False)
    assert torch.equal(sample, tensor)


def test_bad_input(pipe, stitched, call):
    transformer = pipe.transformer
    with pytest.raises(TypeError, match="prompts.*int"):
        apply_value_guidance(transformer, stitched, 3)
    with pytest.raises(TypeError, match="value.*str"):
        apply_value_guidance(transformer, "clip", PROMPTS)
    with pytest.raises(ValueError, match="value.*this very transformer"):
        apply_value_guidance(tiny.tiny_transformer(), stitched, PROMPTS)
    with pytest.raises(ValueError, match="mode"):
        apply_value_guidance(transformer, stitched, PROMPTS, mode="x")
    apply_value_guidance(transformer, stitched, PROMPTS, guidance_scale=3.0)
    with pytest.raises(ValueError, match="guided already"):
        apply_value_guidance(transformer, stitched, PROMPTS)
    with pytest.raises(ValueError, match="pipe: its denoiser is guided by apply_value_guidance"):
        guided_sample(pipe, stitched, PROMPTS)
    with pytest.raises(ValueError, match="guidance_scale: .*without classifier-free guidance"):
        call(guidance_scale=1.0)
    with pytest.raises(ValueError, match="prompts: expected 2 samples or a multiple of it, got 1"):
        call(numbers=(0,), prompts=PROMPTS[:1], guidance_scale=3.0)
    remove_value_guidance(transformer)
    apply_value_guidance(transformer, stitched, PROMPTS, guidance_scale=1.0)
    with pytest.raises(ValueError, match="guidance_scale: expected no unconditional half for 1"):
        call(guidance_scale=3.0)
    call(numbers=(0, 0), guidance_scale=1.0)  # equal latents are not halves
