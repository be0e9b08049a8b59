"""The predicted peak of small models is the peak that is measured when the library runs them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stitchvm_ext.backbones import Condition, backbone_of
from stitchvm_ext.backbones.configurations import CONFIGURATIONS, Configuration
from stitchvm_ext.measure import peak_memory
from stitchvm_ext.plan import architectures
from stitchvm_ext.plan.architectures import Architecture, Tower, build
from stitchvm_ext.plan.count import count
from stitchvm_ext.plan.pieces import Pieces
from stitchvm_ext.plan.scenarios import Scenarios
from stitchvm_ext.playground import models
from stitchvm_ext.value import StitchedValue, TweedieValue
from stitchvm_ext.value.stitch_layer import StitchLayer

RESOLUTION, BATCH, DEPTH = 256, 2, 2  # activations of hundreds of MB over weights of a few


class PlaygroundTower(Tower):
    @property
    def config(self):
        text = {"context_length": 4, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
        return {**models.CLIP_CONFIG, "text_cfg": text}


@pytest.fixture(scope="module")
def playground():
    """The playground's sizes as an architecture, with positions for larger latents."""
    options = {**models.build_transformer().config, "pos_embed_max_size": 64}
    options = {name: value for name, value in options.items() if not name.startswith("_")}
    vae = {name: value for name, value in models.build_autoencoder().config.items() if not name.startswith("_")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGURATIONS, "playground", Configuration("SD3Transformer2DModel", options, 0))
        patch.setitem(architectures.TOWERS, "playground", PlaygroundTower("playground", quick_gelu=False))
        yield Architecture(
            "playground", "AutoencoderKL", vae, pixels_per_latent=4,
            text={"prompt_embeds": (12, 192), "pooled_prompt_embeds": (192,)}, text_encoder_parameters=0,
            block_lists=("dual_attention_layers", "num_layers"), dtype=torch.float32,
        )  # fmt: skip


@pytest.fixture(scope="module")
def scenarios(playground):
    return Scenarios(Pieces(playground, ["playground"], RESOLUTION, depth=DEPTH, layer=1), BATCH)


@pytest.fixture(scope="module")
def real(playground):
    """The same models with numbers in them."""
    torch.manual_seed(0)
    reward = PlaygroundTower("playground", quick_gelu=False).build(6, torch.float32)
    reward.encode_condition = lambda prompts: torch.randn(len(prompts), reward.embed_dim)
    pipe = SimpleNamespace(transformer=playground.denoiser(playground.kinds()), vae=playground.autoencoder())
    encoding = {name: torch.randn(1, *shape) for name, shape in playground.text.items()}
    backbone = backbone_of(pipe.transformer)
    size = (RESOLUTION // 4,) * 2
    stitch = build(lambda: StitchLayer(backbone.width(DEPTH), reward.width, reward.grid), torch.float32)
    stitched = StitchedValue(
        backbone, stitch, reward, depth=DEPTH, layer=1, latent_size=size, null_condition=encoding, text_options={}
    ).requires_grad_(False)
    expanded = {name: row.expand(BATCH, *row.shape[1:]).contiguous() for name, row in encoding.items()}
    other = {name: row + 1 for name, row in expanded.items()}
    condition = Condition(("",) * BATCH, other, expanded, guidance_scale=4.0)
    tweedie = TweedieValue(pipe, reward)
    return SimpleNamespace(
        stitched=stitched, tweedie=tweedie, latents=torch.randn(BATCH, 4, *size), condition=condition
    )


M_MMAP_THRESHOLD = -3  # of mallopt


@pytest.fixture(scope="module", autouse=True)
def exact_allocator():
    """Let the C library give freed tensors back at once, so that a process is as large as what is alive in it."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not Path("/proc/self/statm").exists():
        pytest.skip("needs glibc and /proc")
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    yield
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)


def measured(run) -> int:
    run()  # what is made once and kept
    with peak_memory() as peak:
        run()
    return peak.bytes


def test_tweedie(scenarios, real):
    with_gradient = measured(lambda: real.tweedie.branches_with_value(real.latents, 0.5, real.condition))
    assert scenarios.tweedie(checkpoint=False, cond_only=False).peak == pytest.approx(with_gradient, rel=0.1)


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_stitched(scenarios, real, memory):
    real.stitched.memory = memory
    assert real.stitched.can_share(real.condition)
    shared = measured(lambda: real.stitched.branches_with_value(real.latents, 0.5, real.condition))
    assert scenarios.shared(memory).peak == pytest.approx(shared, rel=0.1)
    own = measured(lambda: real.stitched.value_and_grad(real.latents, 0.5, real.condition))
    assert scenarios.value_grad(memory).peak == pytest.approx(own, rel=0.1)


def test_kept_and_freed_memory_is_counted_to_the_byte():
    def forward():
        a = torch.ones(1000)
        b = a * 2
        return b.view(10, 100), a + 1  # a goes, its kin stay

    cost = count(forward)
    assert (cost.peak, cost.kept) == (12000, 8000)
