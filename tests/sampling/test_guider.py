"""A modular pipeline under ValueGuidance."""

import json

import pytest
import torch
from diffusers import modular_pipelines
from diffusers.guiders import ClassifierFreeGuidance

from stitchvm_ext import TweedieValue, ValueGuidance, apply_value_guidance, guided_sample, remove_value_guidance
from stitchvm_ext.backbones import Condition
from tests import tiny

if not hasattr(modular_pipelines, "StableDiffusion3AutoBlocks"):
    pytest.skip("this diffusers has no modular pipeline of SD3", allow_module_level=True)

PROMPTS = ["a small red circle", "two blue squares"]
STEPS = 4


@pytest.fixture
def modular(pipe):
    made = modular_pipelines.StableDiffusion3AutoBlocks().init_pipeline()
    made.update_components(**{k: v for k, v in pipe.components.items() if v is not None and k in made._component_specs})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def call(modular, seeds):
    def call(guider, numbers=(0, 1), prompts=PROMPTS, **options):
        modular.update_components(guider=guider)
        options = {
            "negative_prompt": "", "num_inference_steps": STEPS, "max_sequence_length": 0, "output": "latents",
        } | options  # fmt: skip
        return modular(prompt=prompts, generator=seeds(*numbers), **options)

    return call


@pytest.fixture
def reference(pipe, seeds):
    def reference(value, numbers=(0, 1), **options):
        options = {
            "num_inference_steps": STEPS, "output_type": "latent", "max_sequence_length": 0, "progress": False,
        } | options  # fmt: skip
        return guided_sample(pipe, value, PROMPTS, generator=seeds(*numbers), **options)

    return reference


@pytest.mark.parametrize(
    "guidance, guidance_scale, negative",
    [
        ({"strength": 0.3}, 4.0, ""),
        ({"strength": 0.3}, 1.0, ""),
        ({"strength": 300.0, "mode": "score", "window": (1, 4), "every": 2}, 4.0, ""),
        ({"strength": 300.0, "mode": "raw", "schedule": "alpha"}, 4.0, ""),
        ({"strength": 0.3}, 4.0, "three green squares"),
    ],
)
def test_equal_to_guided_sample(stitched, call, reference, guidance, guidance_scale, negative):
    guider = ValueGuidance(value=stitched, prompts=PROMPTS, guidance_scale=guidance_scale, **guidance)
    guided = call(guider, negative_prompt=negative)
    expected = reference(stitched, guidance_scale=guidance_scale, negative_prompt=negative, **guidance)
    torch.testing.assert_close(guided, expected.latents, rtol=0, atol=2e-4)
    plain = call(ClassifierFreeGuidance(guidance_scale=guidance_scale), negative_prompt=negative)
    assert (guided - plain).abs().max() > 0.02
    steps = ~expected.values.isnan().any(1)
    torch.testing.assert_close(torch.stack([v for _, v in guider.values]), expected.values[steps], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor([s for s, _ in guider.values]), expected.sigmas[:-1][steps])


def test_prompt_conditioned_and_several_images_per_prompt(stitched, call, reference):
    stitched.prompt_conditioned = True
    options = {"strength": 0.3, "guidance_scale": 3.0}
    guided = call(ValueGuidance(value=stitched, prompts=PROMPTS, **options), numbers=range(4), num_images_per_prompt=2)
    expected = reference(stitched, numbers=range(4), num_images_per_prompt=2, **options).latents
    torch.testing.assert_close(guided, expected, rtol=0, atol=2e-4)


def test_any_estimator(pipe, reward, call, reference):
    value = TweedieValue(pipe, reward)
    options = {"strength": 0.2, "guidance_scale": 3.0}
    guided = call(ValueGuidance(value=value, prompts=PROMPTS, **options))
    torch.testing.assert_close(guided, reference(value, **options).latents, rtol=0, atol=2e-4)


def test_original_formulation_and_rescaling_are_the_base_classs(stitched, call):
    """The value's term is subtracted from what the base class predicts."""
    bases = {"guidance_scale": 3.0, "use_original_formulation": True, "guidance_rescale": 0.7}
    plain = call(ClassifierFreeGuidance(**bases), num_inference_steps=1)
    guider = ValueGuidance(value=stitched, prompts=PROMPTS, strength=300.0, mode="raw", **bases)
    guided = call(guider, num_inference_steps=1)
    start = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1)])
    _, grad = stitched.value_and_grad(start, 1.0, Condition(tuple(PROMPTS), {}))
    assert (300 * grad).abs().max() > 0.02
    torch.testing.assert_close(guided - plain, 300 * grad, rtol=1e-3, atol=1e-4)


def test_prefix_is_shared_where_it_can_be(stitched, call, block_rows):
    call(ValueGuidance(value=stitched, prompts=PROMPTS, guidance_scale=3.0))
    assert block_rows == [2] * (STEPS * 4 * 2)  # the plain call's
    block_rows.clear()
    call(ValueGuidance(value=stitched, prompts=PROMPTS, guidance_scale=3.0), negative_prompt="three green squares")
    assert sum(block_rows) == STEPS * (4 * 4 + 2 * 2)
    block_rows.clear()
    stitched.prompt_conditioned = True
    call(ValueGuidance(value=stitched, prompts=PROMPTS, guidance_scale=3.0), negative_prompt="three green squares")
    assert sum(block_rows) == STEPS * 4 * 4


def test_strength_zero_and_steps_outside_the_window_are_the_base_class_bit_by_bit(stitched, call):
    plain = call(ClassifierFreeGuidance(guidance_scale=3.0))
    assert torch.equal(call(ValueGuidance(guidance_scale=3.0, strength=0)), plain)  # needs no value
    late = ValueGuidance(value=stitched, prompts=PROMPTS, guidance_scale=3.0, window=(STEPS, None))
    assert torch.equal(call(late), plain)
    assert late.values == []


def test_configuration_round_trip(stitched, call, tmp_path):
    guider = ValueGuidance(
        value=stitched, prompts=PROMPTS, guidance_scale=3.0, strength=0.4, schedule="alpha", window=(1, 3), stop=0.9
    )
    expected = call(guider)
    guider.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "guider_config.json").read_text())
    assert saved["strength"] == 0.4 and "value" not in saved and "prompts" not in saved
    loaded = ValueGuidance.from_pretrained(tmp_path, value=stitched, prompts=PROMPTS)
    assert loaded.guidance == guider.guidance
    assert torch.equal(call(loaded), expected)
    assert torch.equal(call(guider.new()), expected)
    assert not torch.equal(call(guider.new(strength=0.1)), expected)
    bare = ValueGuidance.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="value: expected it to be set"):
        call(bare)
    bare.value, bare.prompts = stitched, PROMPTS
    assert torch.equal(call(bare), expected)


def test_bad_input(pipe, stitched, call):
    with pytest.raises(TypeError, match="value.*str"):
        ValueGuidance(value="clip", prompts=PROMPTS)
    with pytest.raises(TypeError, match="prompts.*int"):
        ValueGuidance(value=stitched, prompts=3)
    with pytest.raises(ValueError, match="strength"):
        ValueGuidance(value=stitched, prompts=PROMPTS, strength=-1)
    guider = ValueGuidance(value=stitched, prompts=PROMPTS, guidance_scale=3.0)
    with pytest.raises(ValueError, match='negative_prompt: expected a text, "" for the empty one'):
        call(guider, negative_prompt=None)
    with pytest.raises(ValueError, match="prompts: expected 2 samples or a multiple of it, got 1"):
        call(guider, prompts=PROMPTS[:1], numbers=(0,))
    with pytest.raises(ValueError, match="very transformer"):
        guider.prepare_models(tiny.tiny_transformer())
    apply_value_guidance(pipe.transformer, stitched, PROMPTS)
    with pytest.raises(ValueError, match="guided by apply_value_guidance too"):
        call(guider)
    remove_value_guidance(pipe.transformer)
    # A call that failed leaves no hook behind.
    plain = call(ClassifierFreeGuidance(guidance_scale=3.0))
    assert torch.equal(call(ClassifierFreeGuidance(guidance_scale=3.0)), plain)
    assert (call(guider) - plain).abs().max() > 0.02
