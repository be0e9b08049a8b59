"""The models at three sizes: the playground's own, a quarter of SD3.5 Medium, and all of it.

The larger two have random weights: speed and memory depend on shapes alone, and nothing is downloaded. What they say
about quality is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones import Condition, DiffusionBackbone, backbone_of, expand_rows
from ..backbones.configurations import CONFIGURATIONS
from ..plan.architectures import ARCHITECTURES, TOWERS
from ..precision import fast_dtype
from ..rewards import OpenClipReward
from ..value import StitchedValue
from ..value.stitch_layer import StitchLayer

BACKBONE, TOWER = "sd3.5-medium", "clip-l14-336"
PROMPT = "a photograph"


@dataclass(frozen=True)
class Scale:
    """A part of SD3.5 Medium at its true width, its whole autoencoder, and a part of ViT-L/14-336.

    Attributes:
        blocks: of the denoiser; in the same proportion as there, the first ones have a second attention.
        depth: i, blocks that the value keeps.
        layers: of the image tower.
        pixels: by device type. On a CPU as many as minutes and 24 GB allow.
    """

    blocks: int
    depth: int
    layers: int
    pixels: dict[str, int] = field(hash=False)


SCALES = {
    "quarter": Scale(blocks=6, depth=1, layers=6, pixels={"cpu": 256, "cuda": 512}),
    "real": Scale(blocks=24, depth=4, layers=24, pixels={"cpu": 448, "cuda": 1024}),
}
SCALE_NAMES = ("playground", *SCALES)


@dataclass
class Setup:
    """One latent to be guided, and all that guides it.

    Attributes:
        pipe: has the denoiser (``transformer``) and ``vae``.
        latents: float32 [1, C, h, w].
        description: what it is, for the result's file.
    """

    pipe: Any
    reward: OpenClipReward
    value: StitchedValue
    condition: Condition
    latents: Tensor
    description: dict[str, Any]

    @property
    def backbone(self) -> DiffusionBackbone:
        return self.value.backbone

    @property
    def device(self) -> str:
        return self.latents.device.type

    def weights(self) -> list[Tensor]:
        """Parameters and buffers that are there whatever is run."""
        modules = (self.pipe.transformer, self.pipe.vae, self.reward, self.value)
        return [t for module in modules for t in (*module.parameters(), *module.buffers())]


def build(scale: str, device: str = "cpu", pixels: int | None = None) -> Setup:
    """The models of a scale, frozen.

    Args:
        pixels: side of the image; by default the scale's own.

    Raises:
        ValueError: an unknown scale, or a side that does not fit it.
    """
    if scale not in SCALE_NAMES:
        raise ValueError(f"scale: expected one of {list(SCALE_NAMES)}, got {scale!r}")
    return _playground(device, pixels) if scale == "playground" else _random(scale, device, pixels)


def _playground(device: str, pixels: int | None) -> Setup:
    from .. import playground
    from ..sampling.encoding import encode_condition

    if pixels not in (None, 64):
        raise ValueError(f"pixels: expected 64, the side of the playground's images, got {pixels}")
    pipe = playground.load_pipeline().to(device)
    value = playground.load_value(pipe)
    reward = playground.load_reward("clip").to(device)
    condition = encode_condition(pipe, value.backbone, ["a red circle"], [""], 3.0, value.text_options)
    return Setup(
        pipe, reward, value, condition, _noise((1, 4, 16, 16), device),
        {
            "scale": "playground", "weights": "trained", "dtype": "float32", "pixels": 64,
            "blocks": value.backbone.depth, "depth": value.depth, "parameters": _count(pipe.transformer),
        },
    )  # fmt: skip


def _random(name: str, device: str, pixels: int | None) -> Setup:
    import diffusers
    from open_clip.model import CLIP

    scale, dtype, architecture = SCALES[name], fast_dtype(device), ARCHITECTURES[BACKBONE]
    pixels = scale.pixels[torch.device(device).type] if pixels is None else pixels
    if pixels < 1 or pixels % architecture.multiple:
        raise ValueError(f"pixels: expected a multiple of {architecture.multiple}, got {pixels}")
    options = dict(CONFIGURATIONS[architecture.configuration].options)
    dual = len(options["dual_attention_layers"]) * scale.blocks // options["num_layers"]
    options.update(num_layers=scale.blocks, dual_attention_layers=tuple(range(dual)))
    transformer = random_module(lambda: diffusers.SD3Transformer2DModel(**options), dtype, device)
    vae = random_module(lambda: diffusers.AutoencoderKL(**architecture.vae_options), dtype, device)
    config = TOWERS[TOWER].config
    config["vision_cfg"] = {**config["vision_cfg"], "layers": scale.layers}
    reward = OpenClipReward(random_module(lambda: CLIP(**config), dtype, device), None, config)
    # Next to no text tower was built; the prompt's embedding is as random as the weights.
    reward.text.cache[PROMPT] = F.normalize(_noise((reward.embed_dim,), "cpu"), dim=-1)

    backbone, side = backbone_of(transformer), pixels // architecture.pixels_per_latent
    cond, null = ({k: _noise((1, *s), device, i).to(dtype) for k, s in architecture.text.items()} for i in (1, 2))
    suffix = reward.suffix(1)
    stitch = StitchLayer(backbone.width(scale.depth), suffix.width, suffix.grid)
    nn.init.normal_(stitch.mlp[3].weight, std=0.02)  # a new one is zero there
    value = StitchedValue(
        backbone, stitch, suffix, depth=scale.depth, layer=1, latent_size=(side, side), null_condition=null,
        text_options={},
    ).to(device, dtype).eval().requires_grad_(False)  # fmt: skip
    latents = _noise((1, backbone.latent_channels, side, side), device)
    return Setup(
        SimpleNamespace(transformer=transformer, vae=vae), reward, value,
        Condition((PROMPT,), cond, expand_rows(null, 1), guidance_scale=4.5), latents,
        {
            "scale": name, "weights": "random: enough for speed and memory, and for nothing else",
            "dtype": str(dtype).removeprefix("torch."), "pixels": pixels, "backbone": BACKBONE, "blocks": scale.blocks,
            "depth": scale.depth, "width": backbone.width(1), "parameters": _count(transformer),
            "image_tokens": math.prod(backbone.grid((side, side))), "text_tokens": cond["prompt_embeds"].shape[1],
            "vae_parameters": _count(vae), "reward": TOWER, "reward_layers": scale.layers,
            "reward_parameters": _count(reward),
        },
    )  # fmt: skip


def random_module(make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    """A frozen module with random weights, made in seconds: no initialisation runs, and no float32 copy exists.

    Matrices and kernels are Gaussian with variance 1 / fan-in, norms and biases the identity.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # buffers hold position tables
        module = make()
    pool = _noise((1_000_003,), "cpu").to(dtype)  # a prime: no two rows of a matrix are alike
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                filled = _filled(parameter.shape, name, pool).to(device)
                part._parameters[name] = nn.Parameter(filled, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device, dtype if buffer.is_floating_point() else None)
    return module.eval()


def _filled(shape: torch.Size, name: str, pool: Tensor) -> Tensor:
    if len(shape) < 2:
        return pool.new_ones(shape) if name == "weight" else pool.new_zeros(shape)
    flat = torch.empty(shape.numel(), dtype=pool.dtype)
    scaled = pool * math.prod(shape[1:]) ** -0.5
    for start in range(0, len(flat), len(pool)):
        flat[start : start + len(pool)] = scaled[: len(flat) - start]
    return flat.view(shape)


def _noise(shape: tuple[int, ...], device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
