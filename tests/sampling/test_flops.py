"""What FK steering with proposals costs at the geometry of SD3.5 Medium and HPSv2, by PyTorch's own FLOP counter on
fake tensors: nothing is computed.
"""

import diffusers
import pytest
import torch
from open_clip.model import CLIP
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stitchvm_ext.backbones import Condition, backbone_of, expand_rows
from stitchvm_ext.backbones.configurations import CONFIGURATIONS
from stitchvm_ext.rewards import OpenClipReward
from stitchvm_ext.sampling.denoiser import Denoiser
from stitchvm_ext.value import StitchedValue
from stitchvm_ext.value.carry import PrefixCarry
from stitchvm_ext.value.stitch_layer import StitchLayer

SIDE, TEXT, DEPTH = 128, 333, 4
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what attention is on the fake CPU
HPSV2 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "patch_size": 14, "width": 1280, "layers": 32, "head_width": 80},
    "text_cfg": {"context_length": 4, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1},
}


def attention_flops(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


def teraflops(run) -> float:
    counter = FlopCounterMode(display=False, custom_mapping={ATTENTION: attention_flops})
    with counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e12


@pytest.fixture
def sd35_medium(monkeypatch):
    """(value, condition for a number of rows) on fake tensors; questions that need numbers are answered for them."""
    monkeypatch.setattr(StitchedValue, "is_null_text", lambda self, encoding: True)
    monkeypatch.setattr("stitchvm_ext.fused.fused_forward.is_joint_block", lambda block: False)
    check = lambda self, z, sigma: torch.as_tensor(sigma, dtype=torch.float32).expand(len(z))  # noqa: E731
    monkeypatch.setattr("stitchvm_ext.backbones.base.DiffusionBackbone.check_latents", check)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        options = CONFIGURATIONS["stable-diffusion-3.5-medium"].options
        transformer = diffusers.SD3Transformer2DModel(**options).eval().requires_grad_(False)
        backbone = backbone_of(transformer)
        suffix = OpenClipReward(CLIP(**HPSV2), None, HPSV2)  # its part from block 1 on is all that runs
        null = {
            "prompt_embeds": torch.zeros(1, TEXT, 4096),
            "pooled_prompt_embeds": torch.zeros(1, 2048),
        }
        stitch = StitchLayer(backbone.width(DEPTH), suffix.width, suffix.grid)
        value = StitchedValue(
            backbone, stitch, suffix, depth=DEPTH, layer=1, latent_size=(SIDE, SIDE), null_condition=null,
            text_options={},
        ).eval().requires_grad_(False)  # fmt: skip
        value.suffix.encode_condition = lambda prompts: torch.zeros(len(prompts), 1024)

        def condition(rows):
            return Condition(("",) * rows, expand_rows(null, rows), expand_rows(null, rows), guidance_scale=4.5)

        yield value, condition
    torch.set_default_dtype(before)


def test_fk_with_proposals_on_sd35_medium(sd35_medium):
    """N = 4, M = 2, 40 steps, proposals on the first 16, events every 4 steps from 8 to 32 (the paper's setting): 5.5%
    above four plain trajectories, against 11.1% with a prefix of its own (BUDGET.md f).
    """
    value, condition = sd35_medium
    denoiser, n, m = Denoiser(value.backbone, value), 4, 2
    noisy = lambda rows: torch.zeros(rows, 16, SIDE, SIDE)  # noqa: E731
    plain = teraflops(lambda: denoiser.branches(noisy(n), 0.5, condition(n)))
    assert plain / n == pytest.approx(22.5, rel=0.02)

    carries = []
    ask = lambda rows, carry: carries.append(denoiser.values(noisy(rows), 0.5, condition(rows), carry)[1])  # noqa: E731
    proposals, event = teraflops(lambda: ask(n * m, True)), teraflops(lambda: ask(n, True))
    apart_proposals, apart_event = teraflops(lambda: ask(n * m, False)), teraflops(lambda: ask(n, False))
    assert apart_event / n == pytest.approx(2.56, rel=0.02)
    kept = carries[0].rows(torch.arange(0, n * m, m))
    assert isinstance(kept, PrefixCarry)
    resumed = teraflops(lambda: denoiser.branches(noisy(n), 0.5, condition(n), kept))

    steps, choosing, events = 40, 16, 5  # events at 16, 20, ... 32: those at 8 and 12 read the proposals' values
    shared = choosing * (proposals + resumed - plain) + events * (event + resumed - plain)
    apart = choosing * apart_proposals + events * apart_event
    assert shared / (steps * plain) == pytest.approx(0.055, abs=0.003)
    assert apart / (steps * plain) == pytest.approx(0.105, abs=0.008)
