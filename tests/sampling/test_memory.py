"""Encodings given by the caller, and ``memory="low"``: the same images, less on the device, all of it restored."""

from __future__ import annotations

import copy

import pytest
import torch

from stitchvm_ext import (
    MonteCarloValue,
    TweedieValue,
    ValueSum,
    backbone_of,
    encode_prompts,
    guided_sample,
    precompute_conditioning,
)
from stitchvm_ext.backbones import Condition
from stitchvm_ext.sampling import memory as measures
from tests import tiny
from tests.tiny.catalogue import PIPELINES

PROMPTS = ["a small red circle", "two blue squares"]
OPTIONS = {"num_inference_steps": 3, "output_type": "pt", "progress": False}
QUIET = {**OPTIONS, "max_sequence_length": 0}
# The table's matrix products have other shapes than those of the layers that it stands in for.
ROUNDING = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def pipe():
    shared = tiny.tiny_pipeline(t5=True)
    own = type(shared)(**{name: copy.deepcopy(part) for name, part in shared.components.items()})
    own.set_progress_bar_config(disable=True)
    return own


@pytest.fixture
def value(pipe, stitched):
    own = copy.copy(stitched)
    object.__setattr__(own, "backbone", backbone_of(pipe))
    return own


def state(pipe, value):
    """All that ``memory="low"`` may touch."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "tensors": {(n, k): (t.data_ptr(), t.device) for n, m in modules.items() for k, t in m.state_dict().items()},
        "vae": {k: v for k, v in pipe.vae.__dict__.items() if k.startswith(("use_", "tile_"))},
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) for part in modules.values() for m in part.modules()
        ],
        "forwards": [m for part in modules.values() for m in part.modules() if "forward" in m.__dict__],
        "memory": None if value is None else value.memory,
    }


def saving(output, measure):
    (found,) = [entry for entry in output.memory_report if entry.measure == measure]
    return found


# -- encodings ---------------------------------------------------------------------------------------------------------


def test_a_condition_in_place_of_prompts(pipe, value, seeds):
    options = {**OPTIONS, "strength": 0.3, "num_images_per_prompt": 2}
    asked = guided_sample(
        pipe,
        value,
        PROMPTS,
        guidance_scale=3.0,
        negative_prompt=["", "a circle"],
        generator=seeds(*range(4)),
        **options,
    )
    condition = encode_prompts(pipe, PROMPTS, ["", "a circle"], value=value, guidance_scale=3.0)
    pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
    given = guided_sample(pipe, value, condition=condition, generator=seeds(*range(4)), **options)
    assert torch.equal(asked.images, given.images) and given.evaluations == asked.evaluations
    with_report = guided_sample(pipe, value, condition=condition, generator=seeds(*range(4)), memory="low", **options)
    assert saving(with_report, "text encoders").note.startswith("the pipeline has none")


def test_the_pipelines_own_prompt_embeds(pipe, seeds):
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt=PROMPTS[:1], prompt_2=None, prompt_3=None, max_sequence_length=12
    )
    theirs = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=negative, pooled_prompt_embeds=pooled, guidance_scale=3.0,
        negative_pooled_prompt_embeds=negative_pooled, num_inference_steps=3, generator=seeds(0), output_type="pt",
    ).images  # fmt: skip
    cond = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    uncond = {"prompt_embeds": negative, "pooled_prompt_embeds": negative_pooled}
    condition = Condition((PROMPTS[0],), cond, uncond, guidance_scale=3.0)
    ours = guided_sample(pipe, None, condition=condition, generator=seeds(0), **OPTIONS).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"prompt": "a circle"}, ValueError, "^prompt: expected none beside a condition"),
        ({"negative_prompt": "a circle"}, ValueError, "^negative_prompt: expected none"),
        ({"max_sequence_length": 12}, ValueError, "^max_sequence_length: expected none"),
        ({"guidance_scale": 2.0}, ValueError, "^guidance_scale: expected the condition's own, 3, got 2"),
        ({"condition": {"prompt_embeds": 1}}, TypeError, "^condition: expected a Condition, got dict"),
        ({"condition": Condition((), {})}, ValueError, "^condition: expected at least one row"),
        (
            {"condition": Condition(("a",), {"prompt_embeds": torch.zeros(1, 4, 64)})}, ValueError,
            "^condition: expected 'pooled_prompt_embeds' in cond, which SD3Backbone reads, got .'prompt_embeds'",
        ),
        ({"memory": "lowest"}, ValueError, "^memory: expected one of .'normal', 'low'., got 'lowest'"),
    ],
)  # fmt: skip
def test_bad_input(pipe, options, error, message):
    options = {"condition": encode_prompts(pipe, PROMPTS, guidance_scale=3.0), **options}
    with pytest.raises(error, match=message):
        guided_sample(pipe, None, **OPTIONS, **options)


# -- memory="low" ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [{"strength": 0.3}, {"method": "fk", "num_particles": 2, "num_proposals": 2, "scale": 2.0}]
)
@pytest.mark.parametrize("kind", ["stitched", "tweedie", "sum"])
def test_the_images_are_the_same_and_all_is_restored(pipe, value, reward, seeds, kind, method):
    asked = {"stitched": value, "tweedie": TweedieValue(pipe, reward)}
    asked["sum"] = ValueSum([(value, 1.0), (asked["tweedie"], 0.5)])
    before = state(pipe, value)
    options = {"guidance_scale": 3.0, **QUIET, **method}
    runs = [
        guided_sample(pipe, asked[kind], PROMPTS, generator=seeds(0, 1), memory=level, **options)
        for level in ("normal", "low")
    ]
    assert runs[0].memory_report == [] and state(pipe, value) == before
    torch.testing.assert_close(runs[1].images, runs[0].images, **ROUNDING)
    torch.testing.assert_close(runs[1].values, runs[0].values, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert runs[1].evaluations == runs[0].evaluations

    encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    entry = saving(runs[1], "text encoders")
    tensors = {id(t): t.nbytes for m in encoders for t in (*m.parameters(), *m.buffers())}
    assert entry.bytes == sum(tensors.values()) and "on the CPU nothing leaves memory" in str(entry)
    pooled = [
        pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False, max_sequence_length=0)[2]
        for text in ("", *PROMPTS)
    ]
    with precompute_conditioning(pipe, runs[1].sigmas, torch.cat(pooled)) as table:
        with_zero = table.nbytes * 4 // 3  # the preset's has a row more, for noise level 0
        assert saving(runs[1], "modulation").bytes == table.replaced_bytes - with_zero > 0
    guided = kind != "tweedie" and "method" not in method
    assert (saving(runs[1], "gradient").bytes > 0) == guided
    assert saving(runs[1], "decode").bytes > 0  # two images, one at a time


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "sd3"])
def test_other_families(name, seeds):
    pipe = PIPELINES[name]()
    options = {**OPTIONS, "num_inference_steps": 2, "guidance_scale": 3.0}
    options |= {"height": 64, "width": 64} if name in ("wan", "hunyuan-video") else {}
    runs = [guided_sample(pipe, None, PROMPTS, generator=seeds(0, 1), **options)]
    before = state(pipe, None)  # transformers' text encoders keep hooks of their own once they have run
    runs.append(guided_sample(pipe, None, PROMPTS, generator=seeds(0, 1), memory="low", **options))
    assert state(pipe, None) == before
    torch.testing.assert_close(runs[1].latents, runs[0].latents, **ROUNDING)
    if not name.startswith("hunyuan-dit"):  # images of several tiles
        torch.testing.assert_close(runs[1].images, runs[0].images, **ROUNDING)
    assert saving(runs[1], "text encoders").bytes > 0 and saving(runs[1], "modulation").bytes == 0
    assert "not known for" in saving(runs[1], "modulation").note


def test_the_gradients_saving_is_what_autograd_does_not_keep(pipe, value, seeds):
    """Against a count of all that a backward pass keeps, at both levels."""

    def kept(level):
        value.memory, seen = level, {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault((t.data_ptr(), t.shape, t.stride()), t), lambda t: t
        )
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with hooks:
            result = value.value(latents, 0.5, condition)
            total = sum(t.nbytes for t in seen.values() if id(t) not in weights)
        result.sum().backward()
        return total

    condition = encode_prompts(pipe, PROMPTS[0], value=value, guidance_scale=1.0)
    weights = {id(p) for m in (pipe.transformer, value.suffix) for p in m.parameters()}
    spared = kept("save") - kept("recompute")
    value.memory = "save"
    output = guided_sample(
        pipe, value, PROMPTS[0], guidance_scale=1.0, generator=seeds(0), memory="low", strength=0.3, **QUIET
    )
    assert saving(output, "gradient").bytes == pytest.approx(spared, rel=0.02)


def test_tiles_smaller_than_the_image(pipe, seeds, monkeypatch):
    monkeypatch.setattr(measures, "TILE", 24)
    runs = [guided_sample(pipe, None, PROMPTS[0], generator=seeds(0), **QUIET)]
    before = state(pipe, None)
    runs.append(guided_sample(pipe, None, PROMPTS[0], generator=seeds(0), memory="low", **QUIET))
    assert state(pipe, None) == before
    torch.testing.assert_close(runs[1].latents, runs[0].latents, **ROUNDING)
    difference = (runs[1].images - runs[0].images).abs()
    assert 1e-4 < difference.mean() < 0.1  # group norms see a tile: the worst case, an untrained decoder on noise
    entry = saving(runs[1], "decode")
    assert "for 0.562 of the latents" in entry.note  # 12 x 12 of 16 x 16
    single = guided_sample(pipe, None, PROMPTS[:1] * 2, generator=seeds(0, 1), memory="low", **QUIET)
    assert saving(single, "decode").bytes > entry.bytes


def test_all_is_restored_after_a_failure(pipe, value, seeds, monkeypatch):
    monkeypatch.setattr(measures, "TILE", 24)
    pipe.transformer.requires_grad_(True)
    before = state(pipe, value)

    def fail(*args):
        assert state(pipe, value) != before
        raise RuntimeError("out of memory")

    handle = pipe.vae.decoder.register_forward_hook(fail)
    before = state(pipe, value)
    with pytest.raises(RuntimeError, match="out of memory"):
        guided_sample(pipe, value, PROMPTS[0], generator=seeds(0), memory="low", **QUIET)
    with pytest.raises(FloatingPointError):
        latents = torch.full((1, 4, 16, 16), float("nan"))
        guided_sample(pipe, value, PROMPTS[0], latents=latents, memory="low", **QUIET)
    assert state(pipe, value) == before
    handle.remove()
    assert all(p.requires_grad for p in pipe.transformer.parameters())


def test_what_does_not_apply_is_left_out_and_said(pipe, value, reward, seeds):
    rollouts = MonteCarloValue(pipe, reward, num_rollouts=1, num_steps=2)
    output = guided_sample(
        pipe, rollouts, PROMPTS[0], method="fk", num_particles=2, scale=1.0, generator=seeds(0), memory="low",
        **{**QUIET, "output_type": "latent"},
    )  # fmt: skip
    assert "noise levels of its own" in saving(output, "modulation").note
    assert "no gradient" in saving(output, "gradient").note and saving(output, "gradient").bytes == 0
    assert saving(output, "decode").note == "nothing was decoded"
    many = [
        f"{a} {b} {c}" for a in ("a", "two") for b in ("small", "large", "red", "blue") for c in ("circle", "square")
    ]
    output = guided_sample(pipe, None, many, memory="low", **{**QUIET, "output_type": "latent"})
    assert "larger than the weights" in saving(output, "modulation").note
    with precompute_conditioning(pipe, output.sigmas, encode_prompts(pipe, many[0]).cond["pooled_prompt_embeds"]):
        output = guided_sample(
            pipe, None, many[0], guidance_scale=1.0, memory="low", **{**QUIET, "output_type": "latent"}
        )
    assert saving(output, "modulation").note == "a table is installed already"
    pipe.transformer.enable_group_offload("cpu", num_blocks_per_group=1)
    output = guided_sample(pipe, value, PROMPTS[0], generator=seeds(0), memory="low", **QUIET)
    assert "own hooks" in saving(output, "modulation").note


def test_with_offloading_its_hooks_keep_their_modules(pipe, value, seeds):
    plain = guided_sample(pipe, value, PROMPTS[0], generator=seeds(0), **QUIET)
    pipe.enable_model_cpu_offload(device="cpu")
    object.__setattr__(value, "backbone", backbone_of(pipe))
    output = guided_sample(pipe, value, PROMPTS[0], generator=seeds(0), memory="low", **QUIET)
    torch.testing.assert_close(output.images, plain.images, **ROUNDING)
    assert saving(output, "text encoders").bytes == 0 and "its own hooks" in saving(output, "text encoders").note
    assert saving(output, "gradient").bytes > 0  # the transformer is there until the backward: it runs fused
