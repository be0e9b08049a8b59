"""What the small models take, measured in a process of its own: prints JSON.

In a process with a history the C library serves large tensors from what it holds free, and gives nothing back.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.append(str(Path(__file__).parents[2]))  # last: what is installed is tested

from stitchvm_ext.backbones import Condition, backbone_of  # noqa: E402
from stitchvm_ext.backbones.configurations import CONFIGURATIONS, Configuration  # noqa: E402
from stitchvm_ext.measure import peak_memory  # noqa: E402
from stitchvm_ext.plan import architectures  # noqa: E402
from stitchvm_ext.plan.architectures import Architecture, Tower, build  # noqa: E402
from stitchvm_ext.playground import models  # noqa: E402
from stitchvm_ext.value import StitchedValue, TweedieValue  # noqa: E402
from stitchvm_ext.value.stitch_layer import StitchLayer  # noqa: E402

RESOLUTION, BATCH, DEPTH = 256, 2, 2  # activations of hundreds of MB over weights of a few
M_MMAP_THRESHOLD = -3  # of mallopt


class PlaygroundTower(Tower):
    @property
    def config(self):
        text = {"context_length": 4, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
        return {**models.CLIP_CONFIG, "text_cfg": text}


def playground(set_item=dict.__setitem__) -> Architecture:
    """The playground's sizes as an architecture, with positions for larger latents; ``set_item`` makes them known."""
    options = {**models.build_transformer().config, "pos_embed_max_size": 64}
    options = {name: value for name, value in options.items() if not name.startswith("_")}
    vae = {name: value for name, value in models.build_autoencoder().config.items() if not name.startswith("_")}
    set_item(CONFIGURATIONS, "playground", Configuration("SD3Transformer2DModel", options, 0))
    set_item(architectures.TOWERS, "playground", PlaygroundTower("playground", quick_gelu=False))
    return Architecture(
        "playground", "AutoencoderKL", vae, pixels_per_latent=4,
        text={"prompt_embeds": (12, 192), "pooled_prompt_embeds": (192,)}, text_encoder_parameters=0,
        block_lists=("dual_attention_layers", "num_layers"), dtype=torch.float32,
    )  # fmt: skip


def real_models(playground: Architecture) -> SimpleNamespace:
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


def measured(run) -> int:
    run()  # what is made once and kept
    with peak_memory() as peak:
        run()
    return peak.bytes


def main() -> None:
    # The C library gives freed tensors back at once, so that the process is as large as what is alive in it.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    real = real_models(playground())
    found = {"tweedie": measured(lambda: real.tweedie.branches_with_value(real.latents, 0.5, real.condition))}
    assert real.stitched.can_share(real.condition)
    for memory in ("save", "recompute"):
        real.stitched.memory = memory
        call = (real.latents, 0.5, real.condition)
        found[f"shared, {memory}"] = measured(lambda: real.stitched.branches_with_value(*call))  # noqa: B023
        found[f"own, {memory}"] = measured(lambda: real.stitched.value_and_grad(*call))  # noqa: B023
    print(json.dumps(found))


if __name__ == "__main__":
    main()
