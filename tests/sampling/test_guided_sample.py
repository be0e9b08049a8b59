"""guided_sample on a real (tiny) StableDiffusion3Pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image

from stitchvm_ext import TweedieValue, guided_sample
from stitchvm_ext.sampling import TRANSITIONS
from stitchvm_ext.value.base import ValueEstimator
from tests import tiny

PROMPTS = ["a small red circle", "two blue squares"]
QUIET = {"progress": False, "max_sequence_length": 0}


class Unshared(ValueEstimator):
    """The same value without the shared prefix: the base class's own branches_with_value."""

    def __init__(self, value):
        self.backbone, self.inner, self.text_options = value.backbone, value, value.text_options

    def value(self, latents, sigma, condition):
        return self.inner.value(latents, sigma, condition)


# -- against the stock pipeline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 4.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "negative_prompt": ["three green squares", "a circle"]},
        {"guidance_scale": 3.0, "num_images_per_prompt": 2},
        {"guidance_scale": 3.0, "height": 24, "width": 32},
    ],
)
def test_without_guidance_it_is_the_pipeline(pipe, seeds, options):
    numbers = range(2 * options.get("num_images_per_prompt", 1))
    theirs = pipe(
        PROMPTS, num_inference_steps=5, generator=seeds(*numbers), output_type="pt", max_sequence_length=0, **options
    ).images
    ours = guided_sample(
        pipe, None, PROMPTS, num_inference_steps=5, generator=seeds(*numbers), output_type="pt", **QUIET, **options
    )
    torch.testing.assert_close(ours.images, theirs, rtol=0, atol=1e-5)
    assert ours.values.isnan().all() and ours.valued_steps == 0


def test_given_latents_and_one_generator(pipe):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))

    def run(**options):
        options = {"num_inference_steps": 3, "output_type": "latent", **options}
        return guided_sample(pipe, None, PROMPTS[0], **QUIET, **options).latents

    def theirs(**options):
        options = {"num_inference_steps": 3, "output_type": "latent", "max_sequence_length": 0, **options}
        return pipe(PROMPTS[0], **options).images

    torch.testing.assert_close(run(latents=latents), theirs(latents=latents), rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(4)
    torch.testing.assert_close(
        run(generator=generator), theirs(generator=torch.Generator().manual_seed(4)), rtol=0, atol=1e-5
    )


def test_zero_strength_is_plain_sampling_bit_by_bit(pipe, stitched, seeds):
    run = lambda value, **options: guided_sample(  # noqa: E731
        pipe,
        value,
        PROMPTS,
        num_inference_steps=3,
        generator=seeds(0, 1),
        transition="linear_sde",
        output_type="latent",
        **QUIET,
        **options,
    )
    assert torch.equal(run(None).latents, run(stitched, strength=0.0).latents)


def test_dynamic_shifting_and_t5(seeds):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    base = tiny.tiny_pipeline(t5=True)
    pipe = StableDiffusion3Pipeline(
        **{**base.components, "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)}
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS, num_inference_steps=4, generator=seeds(0, 1), output_type="pt", max_sequence_length=12
    ).images
    ours = guided_sample(
        pipe,
        None,
        PROMPTS,
        num_inference_steps=4,
        generator=seeds(0, 1),
        output_type="pt",
        progress=False,
        max_sequence_length=12,
    )
    torch.testing.assert_close(ours.images, theirs, rtol=0, atol=1e-5)


# -- guidance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transition", list(TRANSITIONS))
def test_guidance_raises_the_value(pipe, stitched, seeds, transition):
    options = {"num_inference_steps": 8, "transition": transition, "output_type": "latent", **QUIET}
    last = [
        stitched.value(
            guided_sample(pipe, value, PROMPTS * 2, generator=seeds(0, 1, 2, 3), strength=0.2, **options).latents,
            0.0,
            tiny_condition(pipe, PROMPTS * 2),
        )
        for value in (None, stitched)
    ]
    assert (last[1] > last[0] + 0.01).all()


def tiny_condition(pipe, prompts):
    from stitchvm_ext.backbones import Condition, backbone_of

    return Condition(tuple(prompts), backbone_of(pipe).encode_text(pipe, prompts, max_sequence_length=0))


def test_shared_prefix_equals_unshared_at_the_cost_of_plain_guidance(pipe, stitched, seeds, block_rows):
    """Same images; and the blocks see as many samples as in an unguided run, in half batches."""
    runs = {}
    for name, value in [("plain", None), ("shared", stitched), ("unshared", Unshared(stitched))]:
        block_rows.clear()
        runs[name] = (
            guided_sample(
                pipe,
                value,
                PROMPTS,
                num_inference_steps=5,
                guidance_scale=3.0,
                strength=0.3,
                generator=seeds(0, 1),
                output_type="pt",
                **QUIET,
            ),
            list(block_rows),
        )
    outputs = {name: output for name, (output, _) in runs.items()}
    torch.testing.assert_close(outputs["shared"].images, outputs["unshared"].images, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs["shared"].values, outputs["unshared"].values, rtol=1e-4, atol=1e-5)
    assert (outputs["plain"].images - outputs["shared"].images).abs().max() > 0.01
    assert runs["plain"][1] == [4] * (5 * 4)  # steps x blocks, unconditional and conditional together
    assert runs["shared"][1] == [2] * (5 * 4 * 2)
    assert sum(runs["unshared"][1]) == sum(runs["plain"][1]) + 5 * 2 * 2  # and depth blocks for each sample and step
    assert outputs["plain"].evaluations.denoiser == outputs["shared"].evaluations.denoiser == 5 * 4
    assert outputs["unshared"].evaluations.denoiser == 5 * 4 + 5 * 2 * 0.5


def test_a_negative_prompt_is_not_shared(pipe, stitched, seeds):
    run = lambda value: guided_sample(  # noqa: E731
        pipe,
        value,
        PROMPTS,
        negative_prompt="three green squares",
        num_inference_steps=3,
        generator=seeds(0, 1),
        output_type="latent",
        **QUIET,
    )
    ours, reference = run(stitched), run(Unshared(stitched))
    assert torch.equal(ours.latents, reference.latents)
    assert ours.evaluations.denoiser == reference.evaluations.denoiser


def test_tweedie_guides_too(pipe, reward, seeds):
    output = guided_sample(
        pipe,
        TweedieValue(pipe, reward),
        PROMPTS,
        num_inference_steps=6,
        generator=seeds(0, 1),
        output_type="pt",
        strength=0.2,
        **QUIET,
    )
    plain = guided_sample(pipe, None, PROMPTS, num_inference_steps=6, generator=seeds(0, 1), output_type="pt", **QUIET)
    with torch.no_grad():
        assert (reward(output.images, PROMPTS) > reward(plain.images, PROMPTS) + 0.01).all()


def test_window_every_and_values(pipe, stitched, seeds):
    output = guided_sample(
        pipe,
        stitched,
        PROMPTS,
        num_inference_steps=6,
        window=(1, 6),
        every=2,
        generator=seeds(0, 1),
        output_type="latent",
        **QUIET,
    )
    assert output.values.shape == (6, 2) and output.sigmas.shape == (7,)
    assert output.values.isfinite().all(1).tolist() == [False, True, False, True, False, True]
    assert output.valued_steps == 3


# -- batches and generators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transition", ["ode", "flow_grpo"])
def test_a_sample_does_not_depend_on_its_batch(pipe, stitched, seeds, transition):
    options = {"num_inference_steps": 4, "transition": transition, "output_type": "pt", "strength": 0.2, **QUIET}
    together = guided_sample(pipe, stitched, [*PROMPTS, "a large circle"], generator=seeds(0, 1, 2), **options)
    alone = guided_sample(pipe, stitched, PROMPTS[1], generator=seeds(1), **options)
    torch.testing.assert_close(together.images[1:2], alone.images, rtol=0, atol=1e-4)
    torch.testing.assert_close(together.values[:, 1:2], alone.values, rtol=1e-4, atol=1e-5)
    chunked = guided_sample(
        pipe, stitched, [*PROMPTS, "a large circle"], generator=seeds(0, 1, 2), batch_size=2, **options
    )
    torch.testing.assert_close(together.images, chunked.images, rtol=0, atol=1e-4)


def test_generators(pipe):
    options = {"num_inference_steps": 2, "transition": "linear_sde", "output_type": "latent", **QUIET}

    def run(count, generator):
        return guided_sample(
            pipe, None, PROMPTS[0], num_images_per_prompt=count, generator=generator, **options
        ).latents

    one = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    three = run(3, one())
    assert torch.equal(three, run(3, one()))
    torch.testing.assert_close(
        run(2, one()), three[:2], rtol=0, atol=1e-5
    )  # more samples leave the first ones as they were
    assert (three[0] - three[1]).abs().max() > 0.1 and (three[1] - three[2]).abs().max() > 0.1
    torch.manual_seed(1)
    first = run(2, None)
    assert (first - run(2, None)).abs().max() > 0.1
    torch.manual_seed(1)
    assert torch.equal(first, run(2, None))


def test_low_precision(reward, seeds):
    """A bfloat16 pipeline: float32 latents and steps, and images close to the float32 ones."""
    import copy

    pipe = tiny.tiny_pipeline()
    half = type(pipe)(**{name: copy.deepcopy(part) for name, part in pipe.components.items()}).to(torch.bfloat16)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    runs = [
        guided_sample(
            p,
            TweedieValue(p, reward),
            PROMPTS,
            num_inference_steps=4,
            latents=latents,
            output_type="pt",
            strength=0.1,
            **QUIET,
        )
        for p in (pipe, half)
    ]
    assert runs[1].latents.dtype == runs[1].values.dtype == runs[1].images.dtype == torch.float32
    difference = (runs[0].latents - runs[1].latents).norm() / runs[0].latents.norm()
    assert 0 < difference < 0.1


# -- results -----------------------------------------------------------------------------------------------------------


def test_output_types(pipe, capfd):
    run = lambda kind, **options: guided_sample(  # noqa: E731
        pipe, None, PROMPTS, num_inference_steps=2, generator=[torch.Generator().manual_seed(s) for s in (0, 1)],
        max_sequence_length=0, output_type=kind, **options,
    )  # fmt: skip
    tensor = run("pt", progress=False)
    assert tensor.images.shape == (2, 3, 32, 32) and tensor.images.min() >= 0 and tensor.images.max() <= 1
    array = run("np", progress=False).images
    np.testing.assert_array_equal(array, tensor.images.permute(0, 2, 3, 1).numpy())
    images = run("pil", progress=False).images
    assert all(isinstance(image, Image.Image) and image.size == (32, 32) for image in images)
    assert np.abs(np.asarray(images[0]) / 255 - array[0]).max() < 1 / 255
    assert capfd.readouterr().err == ""
    latent = run("latent", progress=True)
    assert latent.images is latent.latents and latent.latents.shape == (2, 4, 16, 16)
    assert "guided_sample" in capfd.readouterr().err
    assert set(tensor.timings) == {"encode", "sample", "decode", "total"}
    assert sum(tensor.timings[phase] for phase in ("encode", "sample", "decode")) <= tensor.timings["total"]
    assert tensor.seconds_per_image == tensor.timings["total"] / 2


def test_inside_inference_mode(pipe, stitched, seeds):
    options = {"num_inference_steps": 2, "output_type": "latent", **QUIET}
    outside = guided_sample(pipe, stitched, PROMPTS, generator=seeds(0, 1), **options)
    with torch.inference_mode():
        inside = guided_sample(pipe, stitched, PROMPTS, generator=seeds(0, 1), **options)
    assert torch.equal(outside.latents, inside.latents)


def test_nothing_is_left_behind(pipe, stitched):
    """No hooks, no changed flags, no state in the scheduler; also after a failure."""
    transformer = pipe.transformer
    transformer.requires_grad_(True)
    try:
        guided_sample(pipe, stitched, PROMPTS[0], num_inference_steps=2, output_type="latent", **QUIET)
        with pytest.raises(FloatingPointError, match="^velocity: .* step 0"):
            guided_sample(
                pipe,
                stitched,
                PROMPTS[0],
                num_inference_steps=2,
                latents=torch.full((1, 4, 16, 16), float("nan")),
                **QUIET,
            )
        assert all(p.requires_grad and p.grad is None for p in transformer.parameters())
        assert not any(block._forward_pre_hooks or block._forward_hooks for block in transformer.transformer_blocks)
        assert torch.is_grad_enabled()
    finally:
        transformer.requires_grad_(False)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"prompt": 3}, TypeError, "prompt: expected a text or a list of texts, got int"),
        ({"prompt": ["a", 3]}, TypeError, "prompt.*'int', 'str'"),
        ({"prompt": []}, ValueError, "prompt.*empty"),
        ({"negative_prompt": 1}, TypeError, "negative_prompt"),
        ({"negative_prompt": ["a"]}, ValueError, "negative_prompt.*2.*got 1"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, TypeError, "num_inference_steps.*float"),
        ({"num_images_per_prompt": -1}, ValueError, "num_images_per_prompt"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale"),
        ({"guidance_scale": "7"}, TypeError, "guidance_scale"),
        ({"strength": -0.1}, ValueError, "strength"),
        ({"mode": "x"}, ValueError, "mode"),
        ({"schedule": "x"}, ValueError, "schedule"),
        ({"window": (5, 2)}, ValueError, "window"),
        ({"every": 0}, ValueError, "every"),
        ({"transition": "ddim"}, ValueError, "transition.*'ddim'"),
        ({"output_type": "jpg"}, ValueError, "output_type.*'jpg'"),
        ({"height": 31}, ValueError, "height: expected a multiple of 2"),
        ({"height": 0}, ValueError, "height"),
        ({"height": 30}, ValueError, "multiples of 2"),  # a latent of 15, which patches of 2 do not divide
        ({"width": 2000}, ValueError, "up to 32"),
        ({"height": 16, "width": 16}, ValueError, "latent"),  # the value model was made for 16x16 latents
        (
            {"latents": torch.zeros(1, 4, 16, 16)},
            ValueError,
            r"latents: expected shape \[2, 4, 16, 16\], got \[1, 4, 16, 16\]",
        ),
        ({"latents": torch.zeros(2, 4, 16, 16, dtype=torch.long)}, TypeError, "latents.*int64"),
        ({"latents": "noise"}, TypeError, "latents.*str"),
        ({"generator": 3}, TypeError, "generator.*int"),
        ({"generator": [torch.Generator()]}, ValueError, "generator.*2.*got 1"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "generator.*more than once"),
        ({"max_sequence_length": 1000}, ValueError, "max_sequence_length"),
        ({"value": "clip"}, TypeError, "value.*str"),
    ],
)
def test_bad_input_is_refused_before_any_work(pipe, stitched, block_rows, monkeypatch, options, error, message):
    def no_text(*args, **kwargs):
        raise AssertionError("work was done before validation")

    monkeypatch.setattr(pipe, "encode_prompt", no_text)
    arguments = {"value": stitched, "prompt": PROMPTS, **options}
    with pytest.raises(error, match=message):
        guided_sample(pipe, progress=False, **arguments)
    assert not block_rows


def test_a_value_for_another_transformer_is_refused(stitched):
    other = tiny.tiny_pipeline(shift=1.0)
    assert other.transformer is not stitched.backbone.denoiser
    with pytest.raises(ValueError, match="without its latent space.*this pipeline's own denoiser"):
        guided_sample(other, stitched, PROMPTS)
