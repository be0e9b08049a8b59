"""Unchanged pipelines under the hook and the callbacks: SD3 and FLUX, from noise and from images, with and without a
LoRA, each against a loop written out here."""

import copy
import itertools
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from stitchvm_ext import (
    FKSteeringCallback,
    TweedieValue,
    ValueGuidanceCallback,
    apply_value_guidance,
    guided_sample,
    remove_value_guidance,
)
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.sampling import Guidance
from stitchvm_ext.sampling.encoding import encode_condition, split_guidance
from tests import tiny
from tests.tiny.flux import tiny_flux

PROMPTS = ["a small red circle", "two blue squares"]
STEPS = 8
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FAMILIES = {  # pipeline class: (what shares its parts, text options, guidance scale)
    "StableDiffusion3Pipeline": (tiny.tiny_pipeline, {"max_sequence_length": 0}, 4.0),
    "StableDiffusion3Img2ImgPipeline": (tiny.tiny_pipeline, {"max_sequence_length": 0}, 4.0),
    "FluxPipeline": (tiny_flux, {"max_sequence_length": 12}, 3.5),
    "FluxImg2ImgPipeline": (tiny_flux, {"max_sequence_length": 12}, 3.5),
}


class Run:
    """A pipeline, a value on it, and what both are called with."""

    def __init__(self, name, make_stitched, lora_folder=None):
        base, self.text, self.scale = FAMILIES[name]
        parts = dict(base().components)
        if lora_folder is not None:
            parts["transformer"] = copy.deepcopy(parts["transformer"])
        parts["scheduler"] = copy.deepcopy(parts["scheduler"])
        self.pipe = getattr(diffusers, name)(**parts)
        self.pipe.default_sample_size = 16
        self.pipe.set_progress_bar_config(disable=True)
        self.value = make_stitched(self.pipe, **self.text)  # before the LoRA: it shall not matter
        if lora_folder is not None:
            load_lora(self.pipe, lora_folder)
        self.backbone = backbone_of(self.pipe)
        self.from_images = "Img2Img" in name

    def __call__(self, per_prompt=1, steps=STEPS, prompts=PROMPTS, **options):
        options["generator"] = [torch.Generator().manual_seed(5 + k) for k in range(len(prompts) * per_prompt)]
        if self.from_images:
            options |= {"image": IMAGES[: len(prompts)], "strength": 0.5}
            if per_prompt > 1:  # diffusers wants as many images as generators, and hands several out in turn
                options |= {"image": IMAGES[:1], "generator": options["generator"][0]}
        return self.unpack(
            self.pipe(
                prompts, num_inference_steps=steps, guidance_scale=self.scale, num_images_per_prompt=per_prompt,
                height=32, width=32, output_type="latent", **self.text, **options,
            ).images
        )  # fmt: skip

    def unpack(self, latents):
        return self.backbone.unpack(latents, torch.empty(0, 1, 16, 16))

    def start(self, **options):
        """The latents that the transformer sees first, and the noise levels from there on."""
        seen = []
        note = lambda module, args, call: seen.append(self.backbone.read_inputs(call)[:2])  # noqa: E731
        handle = self.pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
        self(**options)
        handle.remove()
        sigmas = self.pipe.scheduler.sigmas[-len(seen) - 1 :]
        torch.testing.assert_close(torch.tensor([s for _, s in seen]), sigmas[:-1])
        return seen[0][0][: len(PROMPTS)], sigmas.tolist()

    def condition(self):
        scale, options = split_guidance(self.backbone, self.scale, 1.0, self.text)
        return encode_condition(self.pipe, self.backbone, PROMPTS, [""] * len(PROMPTS), scale, options)

    @torch.no_grad()
    def velocity(self, z, sigma, condition):
        return condition.guide(*self.backbone.branches(z, sigma, condition))


def load_lora(pipe, folder):
    """By way of a file, as a user has it."""
    donor = copy.deepcopy(pipe.transformer)
    embedders = ["x_embedder"] if "Flux" in type(pipe).__name__ else []
    targets = ["to_q", "to_v", "to_out.0", "context_embedder", *embedders]
    torch.manual_seed(7)
    donor.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    type(pipe).save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(donor))
    pipe.load_lora_weights(folder, adapter_name="style")
    pipe.set_adapters("style", 0.5)


@pytest.fixture(params=[f"{name}{lora}" for name in FAMILIES for lora in ("", "+LoRA")])
def run(request, make_stitched, tmp_path):
    name, _, lora = request.param.partition("+")
    made = Run(name, make_stitched, tmp_path if lora else None)
    yield made
    remove_value_guidance(made.pipe.transformer)


@pytest.fixture
def sd3(make_stitched):
    return Run("StableDiffusion3Pipeline", make_stitched)


def test_hook(run):
    """``v = CFG - c grad V`` at every step."""
    z, sigmas = run.start()
    assert len(sigmas) - 1 == (STEPS // 2 if run.from_images else STEPS)
    guidance, condition = Guidance(0.3, window=(0, 3)), run.condition()
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        velocity = run.velocity(z, sigma, condition)
        if guidance.is_active(step, sigma):
            velocity = velocity - guidance.term(velocity, run.value.value_and_grad(z, sigma, condition)[1], sigma)
        z = z + (following - sigma) * velocity
    plain = run()
    guide = apply_value_guidance(
        run.pipe.transformer, run.value, PROMPTS, guidance_scale=run.scale, strength=0.3, window=(0, 3)
    )
    hooked = run()
    torch.testing.assert_close(hooked, z, rtol=0, atol=5e-4)
    assert (hooked - plain).abs().max() > 0.02 and len(guide.values) == 3


def lagged(run, guidance, value=None):
    """The latents move after a step by what the next one's guidance is, times its length."""
    value = value or run.value
    z, sigmas = run.start()
    condition, values = run.condition(), []
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        velocity = run.velocity(z, sigma, condition)
        z = z + (following - sigma) * velocity
        known = guidance.mode != "relative" or step > 0
        if step + 2 < len(sigmas) and known and guidance.is_active(step + 1, following):
            v, grad = value.value_and_grad(z, following, condition)
            values.append((following, v))
            z = z + (following - sigmas[step + 2]) * guidance.term(velocity, grad, following)
    return z, values


def test_value_guidance_callback(run):
    expected, values = lagged(run, Guidance(0.5))
    callback = ValueGuidanceCallback(run.value, PROMPTS, strength=0.5)
    for _ in range(2):  # a callback serves one call after the other
        guided = run(callback_on_step_end=callback)
        torch.testing.assert_close(guided, expected, rtol=0, atol=5e-4)
        torch.testing.assert_close(callback.values, values, rtol=1e-3, atol=1e-4)
    assert (guided - run()).abs().max() > 0.02


@pytest.mark.parametrize(
    "options", [{"strength": 300.0, "mode": "score", "window": (1, 4), "every": 2}, {"strength": 300.0, "mode": "raw"}]
)
def test_value_guidance_callback_in_other_modes(sd3, options):
    expected, _ = lagged(sd3, Guidance(**options))
    guided = sd3(callback_on_step_end=ValueGuidanceCallback(sd3.value, PROMPTS, **options))
    torch.testing.assert_close(guided, expected, rtol=0, atol=5e-4)
    assert (guided - sd3()).abs().max() > 0.02


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_value_guidance_callback_with_a_value_that_reads_the_texts(name, make_stitched, reward):
    run = Run(name, make_stitched)
    value = TweedieValue(run.pipe, reward)
    value.text_options = run.text
    expected, _ = lagged(run, Guidance(0.3), value)
    guided = run(callback_on_step_end=ValueGuidanceCallback(value, PROMPTS, strength=0.3))
    torch.testing.assert_close(guided, expected, rtol=0, atol=5e-4)


def test_the_lag_shrinks_with_the_steps(sd3):
    """Against the exact guidance, from step 1 on."""
    options = {"strength": 100.0, "mode": "raw", "window": (1, None)}
    apart = []
    for steps in (4, 32):
        lagged = sd3(steps=steps, callback_on_step_end=ValueGuidanceCallback(sd3.value, PROMPTS, **options))
        exact = guided_sample(
            sd3.pipe, sd3.value, PROMPTS, generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
            num_inference_steps=steps, guidance_scale=sd3.scale, output_type="latent", progress=False, **options,
        ).latents  # fmt: skip
        apart.append(float((lagged - exact).norm() / (exact - sd3(steps=steps)).norm()))
    assert apart[0] < 0.5 and apart[1] < 0.4 * apart[0]


def stochastic(pipe):
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)


def test_value_guidance_callback_under_a_stochastic_scheduler(sd3):
    """The last step goes to ``z - sigma u`` without noise, so that the move before it shows up there in full."""
    stochastic(sd3.pipe)
    seen = []

    class Note(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step, timestep, kwargs):
            seen.append(kwargs["latents"].clone())
            return kwargs

    callback = ValueGuidanceCallback(sd3.value, PROMPTS, strength=300.0, mode="raw", window=(STEPS - 1, None))
    torch.manual_seed(0)
    sd3(callback_on_step_end=MultiPipelineCallbacks([Note(), callback, Note()]))
    before, after = seen[2 * (STEPS - 2) : 2 * (STEPS - 1)]
    sigma = float(sd3.pipe.scheduler.sigmas[STEPS - 1])
    _, grad = sd3.value.value_and_grad(before, sigma, sd3.condition())
    torch.testing.assert_close(after - before, sigma * 300 * grad, rtol=1e-3, atol=1e-5)
    assert len(callback.values) == 1


# -- FK steering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 2000.0, "potential": "diff", "ess_threshold": 0.7},
        {"scale": 500.0, "potential": "max", "resampling": "multinomial"},
        {"scale": None, "target_ess": 0.5, "potential": "sum", "resampling": "residual"},
    ],
)
def test_fk_callback_is_guided_sample(name, options, make_stitched, monkeypatch, reward):
    """With the scheduler's own step as transition and the same random numbers: prompt for prompt, particle for
    particle."""
    run, count = Run(name, make_stitched), 3
    stochastic(run.pipe)
    options = {"resample_window": (0.0, 1.0), "resample_every": 2, **options}
    make = lambda: [torch.Generator().manual_seed(5 + k) for k in range(2)]  # noqa: E731
    noise = torch.randn(2 * count, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    renoise = lambda z, u, sigma, following, eps: (1 - following) * (z - sigma * u) + following * eps  # noqa: E731
    ours = guided_sample(
        run.pipe, run.value, PROMPTS, method="fk", num_particles=count, transition=renoise, generator=make(),
        reward=reward, latents=noise, num_inference_steps=STEPS, guidance_scale=run.scale, output_type="latent",
        progress=False, **options,
    )  # fmt: skip

    generators = make()

    def draw(shape, generator=None, device=None, dtype=None):
        return run.backbone.pack(
            torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in generators for _ in range(count)])
        )

    monkeypatch.setattr(scheduling_flow_match_euler_discrete, "randn_tensor", draw)
    steering = FKSteeringCallback(
        run.value, PROMPTS, num_particles=count, reward=reward, generator=generators, **options
    )
    latents = run(per_prompt=count, latents=run.backbone.pack(noise), callback_on_step_end=steering)
    torch.testing.assert_close(latents, ours.particles.flatten(0, 1), rtol=0, atol=5e-4)
    torch.testing.assert_close(latents[steering.best], ours.latents, rtol=0, atol=5e-4)
    torch.testing.assert_close(steering.rewards, ours.rewards, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(steering.log_weights, ours.log_weights, rtol=0.02, atol=0.02)
    torch.testing.assert_close(steering.log_evidence, ours.log_evidence, rtol=0.02, atol=0.02, equal_nan=True)
    assert any(not torch.equal(a, torch.arange(count).repeat(2, 1)) for a in steering.ancestors)


def test_fk_callback_everywhere(run):
    """The particles after an event are those before it, by ancestor; their values are the value's."""
    stochastic(run.pipe)
    seen = {}

    class Note(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step, timestep, kwargs):
            seen.setdefault(step, []).append(run.unpack(kwargs["latents"]).clone())
            return kwargs

    steering = FKSteeringCallback(run.value, PROMPTS, num_particles=3, resample_window=(1, None), resample_every=1)
    run(per_prompt=3, callback_on_step_end=MultiPipelineCallbacks([Note(), steering, Note()]))
    sigmas, condition = steering.sigmas, run.condition().rows([0, 0, 0, 1, 1, 1])
    assert len(sigmas) - 1 == len(seen) == (STEPS // 2 if run.from_images else STEPS)
    for event, step in enumerate(range(1, len(seen) - 1)):
        before, after = seen[step]
        sigma, values = steering.values[event]
        assert sigma == sigmas[step + 1]
        torch.testing.assert_close(values.flatten(), run.value.value(before, sigma, condition), rtol=1e-3, atol=1e-4)
        rows = steering.ancestors[event] + torch.tensor([[0], [3]])
        assert torch.equal(after, before[rows.flatten()])
        assert len(rows.unique()) < 6  # at half of the effective sample size, copies there are
    assert torch.equal(*seen[len(seen) - 1])
    assert torch.equal(steering.best, steering.rewards.argmax(1) + torch.tensor([0, 3]))


def test_fk_callback_without_pressure_changes_nothing(sd3):
    stochastic(sd3.pipe)
    outputs = []
    for callback in (None, FKSteeringCallback(sd3.value, PROMPTS, scale=0.0, num_particles=2)):
        torch.manual_seed(0)
        outputs.append(sd3(per_prompt=2, callback_on_step_end=callback))
    assert torch.equal(*outputs)
    assert callback.log_evidence.abs().max() < 1e-12


def test_strength_zero_changes_nothing(sd3):
    assert torch.equal(sd3(callback_on_step_end=ValueGuidanceCallback(sd3.value, PROMPTS, strength=0)), sd3())


# -- what else ---------------------------------------------------------------------------------------------------------


def test_a_value_made_before_a_lora_was_loaded_reads_it(make_stitched, tmp_path):
    """The embedders too, which are no part of the blocks."""
    run = Run("FluxPipeline", make_stitched)
    run.pipe = type(run.pipe)(**{**run.pipe.components, "transformer": copy.deepcopy(run.pipe.transformer)})
    value, z = make_stitched(run.pipe, **run.text), torch.randn(2, 4, 16, 16)
    plain = value.value(z, 0.5, run.condition())
    load_lora(run.pipe, tmp_path)
    adapted = value.value(z, 0.5, run.condition())
    fresh = make_stitched(run.pipe, **run.text).value(z, 0.5, run.condition())
    torch.testing.assert_close(adapted, fresh, rtol=1e-5, atol=1e-6)
    assert (adapted - plain).abs().max() > 1e-4
    run.pipe.unload_lora_weights()
    torch.testing.assert_close(value.value(z, 0.5, run.condition()), plain, rtol=1e-5, atol=1e-6)


def test_import_does_not_need_diffusers():
    code = "import sys, stitchvm_ext, stitchvm_ext.sampling as s; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_input(sd3, make_stitched):
    with pytest.raises(TypeError, match="value.*str"):
        ValueGuidanceCallback("clip", PROMPTS)
    with pytest.raises(TypeError, match="prompts.*int"):
        FKSteeringCallback(sd3.value, 3)
    with pytest.raises(TypeError, match="reward.*str"):
        FKSteeringCallback(sd3.value, PROMPTS, reward="clip")
    with pytest.raises(ValueError, match="potential"):
        FKSteeringCallback(sd3.value, PROMPTS, potential="x")
    with pytest.raises(ValueError, match="window, schedule: .*from step 2 on"):
        sd3(callback_on_step_end=ValueGuidanceCallback(sd3.value, PROMPTS, window=(0, 2)))
    with pytest.raises(ValueError, match="prompts: expected 2 samples or a multiple of it, got 1"):
        sd3(prompts=PROMPTS[:1], callback_on_step_end=ValueGuidanceCallback(sd3.value, PROMPTS))
    with pytest.raises(ValueError, match="pipeline.scheduler: expected a stochastic one"):
        sd3(per_prompt=4, callback_on_step_end=FKSteeringCallback(sd3.value, PROMPTS))
    with pytest.raises(ValueError, match="num_particles: expected the pipeline's num_images_per_prompt, got 4"):
        sd3(per_prompt=3, callback_on_step_end=FKSteeringCallback(sd3.value, PROMPTS))
    stochastic(sd3.pipe)
    with pytest.raises(ValueError, match="resample_window"):
        sd3(per_prompt=4, callback_on_step_end=FKSteeringCallback(sd3.value, PROMPTS, resample_window=(9, 12)))
    with pytest.raises(ValueError, match="pipeline.scheduler: expected a deterministic one"):
        sd3(callback_on_step_end=ValueGuidanceCallback(sd3.value, PROMPTS))
    flux = Run("FluxPipeline", make_stitched)
    with pytest.raises(ValueError, match="height, width"):
        flux(callback_on_step_end=ValueGuidanceCallback(flux.value, PROMPTS, height=64))
    with pytest.raises(ValueError, match="value: expected|value: it was made without its latent space"):
        flux(callback_on_step_end=ValueGuidanceCallback(sd3.value, PROMPTS))
    apply_value_guidance(flux.pipe.transformer, flux.value, PROMPTS, guidance_scale=flux.scale)
    with pytest.raises(ValueError, match="guided by apply_value_guidance"):
        flux(callback_on_step_end=ValueGuidanceCallback(flux.value, PROMPTS))
    remove_value_guidance(flux.pipe.transformer)
