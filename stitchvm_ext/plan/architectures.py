"""The models that can be planned for, by short name: true configurations, built on fake tensors in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import DiffusionBackbone, Encoding, backbone_of
from ..backbones.configurations import CONFIGURATIONS
from ..backbones.hunyuan_image import HunyuanImageBackbone
from ..rewards import AestheticReward, OpenClipReward, RewardModel
from ..rewards.scalar_head import ScalarHead


@dataclass(frozen=True)
class Architecture:
    """A pipeline: its denoiser, its autoencoder, and what its texts look like.

    Attributes:
        configuration: name in :data:`backbones.configurations.CONFIGURATIONS`.
        vae: the autoencoder's class in diffusers; ``vae_options`` what the published config.json gives it.
        pixels_per_latent: along each axis.
        text: shapes of one text's encoding, less the leading batch dimension. Those named ``..._mask`` are masks.
        text_encoder_parameters: of all text encoders together.
        block_lists: how many blocks of each kind, in running order: option of the denoiser, or for the leading blocks
            with a second attention "dual_attention_layers".
        classifier_free: the pipeline runs an unconditional branch beside the conditional one.
        dtype: of weights and activations.
    """

    configuration: str
    vae: str
    vae_options: dict[str, Any]
    pixels_per_latent: int
    text: dict[str, tuple[int, ...]]
    text_encoder_parameters: int
    block_lists: tuple[str, ...]
    classifier_free: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def multiple(self) -> int:
        """Of pixels, which an image's side has to be: transformers over latents of 8 pixels take patches of two."""
        return self.pixels_per_latent * (2 if self.pixels_per_latent == 8 else 1)

    @property
    def parameters(self) -> int:
        return CONFIGURATIONS[self.configuration].parameters

    @property
    def family(self) -> str:
        """The denoiser's class in diffusers."""
        return CONFIGURATIONS[self.configuration].denoiser

    def kinds(self) -> tuple[int, ...]:
        """How many blocks of each kind the published denoiser has."""
        options = CONFIGURATIONS[self.configuration].options
        dual = len(options.get("dual_attention_layers", ()))
        counts = []
        for name in self.block_lists:
            if name == "dual_attention_layers":
                counts.append(dual)
            else:
                counts.append(options[name] - (dual if name == "num_layers" else 0))
        return tuple(counts)

    def denoiser(self, kinds: Sequence[int]) -> nn.Module:
        """The denoiser with other numbers of blocks, to be called within :func:`fake_tensors`."""
        import diffusers

        configuration = CONFIGURATIONS[self.configuration]
        options = dict(configuration.options)
        for name, blocks in zip(self.block_lists, kinds, strict=True):
            if name == "dual_attention_layers":
                options[name] = tuple(range(blocks))
            else:
                options[name] = blocks + (
                    len(options["dual_attention_layers"])
                    if name == "num_layers" and "dual_attention_layers" in self.block_lists
                    else 0
                )
        return build(lambda: getattr(diffusers, configuration.denoiser)(**options), self.dtype)

    def backbone(self, kinds: Sequence[int]) -> DiffusionBackbone:
        return counting_backbone(self.denoiser(kinds))

    def autoencoder(self) -> nn.Module:
        import diffusers

        return build(lambda: getattr(diffusers, self.vae)(**self.vae_options), self.dtype)

    def latents(self, batch: int, resolution: int) -> Tensor:
        side = resolution // self.pixels_per_latent
        channels = self.vae_options.get("latent_channels", 16) * (4 if self.vae == "AutoencoderKLFlux2" else 1)
        return torch.empty(batch, channels, side, side, dtype=self.dtype)

    def encoding(self, batch: int) -> Encoding:
        return {
            name: torch.empty(batch, *shape, dtype=torch.bool if "_mask" in name else self.dtype)
            for name, shape in self.text.items()
        }


def counting_backbone(denoiser: nn.Module) -> DiffusionBackbone:
    """The adapter of a denoiser on fake tensors: numbers are not looked at."""
    if type(denoiser).__name__ == "HunyuanImageTransformer2DModel":
        backbone = _OneText(denoiser)
    else:
        backbone = backbone_of(denoiser)
    backbone.check_latents = lambda latents, sigma: torch.as_tensor(sigma).expand(latents.shape[0])
    return backbone


class _OneText(HunyuanImageBackbone):
    """Sorting two texts by their masks depends on numbers: both lengths go through the first encoder's projection."""

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        none = torch.empty(latents.shape[0], 0, 1)
        call = super().inputs(latents, sigma, {**encoding, "prompt_embeds_2": none, "prompt_embeds_mask_2": none})
        return {**call, "encoder_hidden_states_2": None, "encoder_attention_mask_2": None}


def build(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A frozen module made in a dtype: modules on fake tensors cannot be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _sd3_vae(scaling: float, shift: float) -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
        "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": scaling, "shift_factor": shift,
    }  # fmt: skip


_SD3 = {
    "vae": "AutoencoderKL",
    "vae_options": _sd3_vae(1.5305, 0.0609),
    "pixels_per_latent": 8,
    "text": {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},  # 77 of CLIP and 256 of T5
    "text_encoder_parameters": 4_762_310_656 + 123_650_304 + 694_659_840,  # T5-XXL, CLIP-L, OpenCLIP bigG
}

ARCHITECTURES: dict[str, Architecture] = {
    "sd3.5-medium": Architecture(
        "stable-diffusion-3.5-medium", **_SD3, block_lists=("dual_attention_layers", "num_layers")
    ),
    "sd3.5-large": Architecture("stable-diffusion-3.5-large", **_SD3, block_lists=("num_layers",)),
    "flux.1-dev": Architecture(
        "FLUX.1-dev",
        vae="AutoencoderKL",
        vae_options=_sd3_vae(0.3611, 0.1159),
        pixels_per_latent=8,
        text={"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,), "guidance": ()},
        text_encoder_parameters=4_762_310_656 + 123_060_480,  # T5-XXL, CLIP-L
        block_lists=("num_layers", "num_single_layers"),
        classifier_free=False,
    ),
    "flux.2-dev": Architecture(
        "FLUX.2-dev",
        vae="AutoencoderKLFlux2",
        vae_options={"latent_channels": 32},
        pixels_per_latent=16,
        text={"prompt_embeds": (512, 15360), "guidance": ()},
        text_encoder_parameters=24_011_361_280,  # Mistral Small 3
        block_lists=("num_layers", "num_single_layers"),
        classifier_free=False,
    ),
    "hunyuanimage-2.1": Architecture(
        "HunyuanImage-2.1",
        vae="AutoencoderKLHunyuanImage",
        vae_options={
            "in_channels": 3, "out_channels": 3, "latent_channels": 64, "layers_per_block": 2,
            "block_out_channels": (128, 256, 512, 512, 1024, 1024), "spatial_compression_ratio": 32,
            "sample_size": 384, "scaling_factor": 0.75289,
        },
        pixels_per_latent=32,
        text={"prompt_embeds": (1128, 3584), "prompt_embeds_mask": (1128,)},  # 1000 of Qwen2.5-VL and 128 of ByT5
        text_encoder_parameters=8_292_166_656 + 219_314_944,  # Qwen2.5-VL-7B, ByT5-small's encoder
        block_lists=("num_layers", "num_single_layers"),
    ),
    "qwen-image": Architecture(
        "Qwen-Image",
        vae="AutoencoderKLQwenImage",
        vae_options={},
        pixels_per_latent=8,
        text={"prompt_embeds": (256, 3584), "prompt_embeds_mask": (256,)},  # as long as the prompt; a long one
        text_encoder_parameters=8_292_166_656,  # Qwen2.5-VL-7B
        block_lists=("num_layers",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Tower:
    """An image reward: open_clip's name of its tower, and the sizes of its scalar head, if any."""

    model: str
    quick_gelu: bool
    head: dict[int, tuple[int, int]] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """open_clip's configuration of it, with next to no text tower."""
        import open_clip

        text = {"context_length": 4, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
        return {**open_clip.get_model_config(self.model), "quick_gelu": self.quick_gelu, "text_cfg": text}

    @property
    def layers(self) -> int:
        return self.config["vision_cfg"]["layers"]

    def build(self, layers: int, dtype: torch.dtype) -> RewardModel:
        """The reward with so many layers and without its text tower, to be called within :func:`fake_tensors`."""
        from open_clip.model import CLIP

        config = self.config
        config["vision_cfg"] = {**config["vision_cfg"], "layers": layers}
        clip = build(lambda: CLIP(**config), dtype)
        if self.head is None:
            return OpenClipReward(clip, None, config)
        return AestheticReward(clip, None, config, build(lambda: ScalarHead(self.head, "relu"), dtype))


TOWERS: dict[str, Tower] = {
    "clip-l14-336": Tower("ViT-L-14-336", quick_gelu=True),
    "dfn-h14-378": Tower("ViT-H-14-378-quickgelu", quick_gelu=True),
    "hpsv2": Tower("ViT-H-14", quick_gelu=False),
    "aesthetic": Tower(
        "ViT-L-14", quick_gelu=True, head={0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    ),
}
