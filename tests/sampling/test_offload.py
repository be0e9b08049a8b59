"""diffusers' and accelerate's offloading under guided_sample: the numbers of the plain run, no weight read while it is
away, none left behind.

There is one device here. So weights that are "off the device" are overwritten with NaN meanwhile, which reaches the
result if a pass, forward or backward, reads them; accelerate's sequential offloading leaves parameters on "meta", which
cannot be read at all.
"""

from __future__ import annotations

import copy

import accelerate
import accelerate.hooks
import pytest
import torch
from diffusers.hooks import group_offloading

from stitchvm_ext import (
    TweedieValue,
    apply_value_guidance,
    backbone_of,
    fuse,
    guided_sample,
    remove_value_guidance,
)
from stitchvm_ext.offload import is_offloaded, is_split
from tests import tiny

PROMPTS = ["a small red circle", "two blue squares"]
SCHEMES = ["model", "sequential", "leaf", "group of 1", "group of 3"]  # depth 2 of 4: the second group is cut


class Away:
    """Overwrites weights with NaN, and puts them back."""

    def __init__(self):
        self.kept = {}

    def take(self, tensors):
        for t in tensors:
            if id(t) not in self.kept and t.is_floating_point():
                self.kept[id(t)] = (t, t.data)
                t.data = torch.full_like(t.data, float("nan"))

    def bring(self, tensors):
        for t in tensors:
            if id(t) in self.kept:
                t.data = self.kept.pop(id(t))[1]


@pytest.fixture
def away(monkeypatch):
    record = Away()

    def tensors(group):
        own = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
        return [*own, *group.parameters, *group.buffers]

    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", lambda group: record.take(tensors(group)))
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", lambda group: record.bring(tensors(group)))

    def to_host(hook, module):
        record.take([*module.parameters(), *module.buffers()])
        return module

    def to_device(hook, module, *args, **kwargs):
        if hook.prev_module_hook is not None:
            hook.prev_module_hook.offload()
        record.bring([*module.parameters(), *module.buffers()])
        return args, kwargs

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", to_host)
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", to_device)
    return record


@pytest.fixture
def pipe():
    shared = tiny.tiny_pipeline()
    own = type(shared)(**{name: copy.deepcopy(part) for name, part in shared.components.items()})
    own.set_progress_bar_config(disable=True)
    return own


def offload(pipe, scheme):
    if scheme == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif scheme == "sequential":
        # Not pipe.enable_sequential_cpu_offload: on the CPU accelerate's hooks break on a text encoder's embedding.
        for model in (pipe.transformer, pipe.vae):
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    elif scheme == "leaf":
        pipe.enable_group_offload("cpu", offload_type="leaf_level")
    else:
        pipe.enable_group_offload("cpu", num_blocks_per_group=int(scheme[-1]))


def unshared(value):
    """The same value, whose prefix no branch of the denoiser serves."""
    inner = copy.copy(value)
    inner.can_share = lambda condition: False
    return inner


def runs(pipe, stitched, reward):
    """Name and result of every way in which weights are used."""
    values = {"shared": stitched, "unshared": unshared(stitched), "tweedie": TweedieValue(pipe, reward)}
    methods = {
        **{f"dps {name}": (value, {"strength": 0.3}) for name, value in values.items()},
        "fk": (stitched, {"method": "fk", "num_particles": 2, "scale": 2.0, "reward": reward}),
        "fk with proposals": (
            stitched, {"method": "fk", "num_particles": 2, "num_proposals": 2, "scale": 2.0, "reward": reward}
        ),
    }  # fmt: skip
    for name, (value, options) in methods.items():
        generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
        yield name, guided_sample(
            pipe, value, PROMPTS, num_inference_steps=3, guidance_scale=3.0, generator=generators, output_type="pt",
            progress=False, max_sequence_length=0, **options,
        )  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_results_are_those_of_the_plain_run(pipe, stitched, reward, away, scheme, fused):
    object.__setattr__(stitched, "backbone", backbone_of(pipe))
    expected = dict(runs(pipe, stitched, reward))
    weights = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}
    if fused:
        fuse(pipe.transformer)
    offload(pipe, scheme)
    object.__setattr__(stitched, "backbone", backbone_of(pipe))
    assert is_offloaded(pipe.transformer) and is_split(pipe.transformer) == (scheme != "model")
    outside = len(away.kept)
    forwards = [block.__dict__.get("forward") for block in pipe.transformer.transformer_blocks]
    for name, output in runs(pipe, stitched, reward):
        plain = expected[name]
        torch.testing.assert_close(output.images, plain.images, rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(output.values, plain.values, rtol=1e-3, atol=1e-4, equal_nan=True)
        assert output.evaluations == plain.evaluations, name
        assert len(away.kept) == outside, f"{name}: weights left on the device"
        assert [block.__dict__.get("forward") for block in pipe.transformer.transformer_blocks] == forwards
    for block in pipe.transformer.transformer_blocks:
        assert not block._forward_pre_hooks and not block._forward_hooks
    if scheme == "model":
        pipe.remove_all_hooks()
        away.bring([*pipe.transformer.parameters(), *pipe.transformer.buffers()])
        assert all(torch.equal(p, weights[name]) for name, p in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_transformer_hook_too(pipe, stitched, away, scheme):
    def run():
        object.__setattr__(stitched, "backbone", backbone_of(pipe))
        apply_value_guidance(pipe.transformer, stitched, PROMPTS[0], guidance_scale=3.0, strength=0.3)
        try:
            return pipe(
                PROMPTS[0], num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
                output_type="pt", max_sequence_length=0,
            ).images  # fmt: skip
        finally:
            remove_value_guidance(pipe.transformer)

    expected = run()
    offload(pipe, scheme)
    torch.testing.assert_close(run(), expected, rtol=0, atol=2e-4)
