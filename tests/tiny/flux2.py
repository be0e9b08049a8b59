"""FLUX.2 [dev] and [klein]: 32x32 images, 16x8x8 latents, 64 image tokens; two double and two single blocks."""

from __future__ import annotations

import functools

import torch

from . import spread
from .qwen_image import CHAT_WORDS, chat_tokenizer

TEXT = {
    "vocab_size": len(CHAT_WORDS), "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} "
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}"
    " <|im_end|>{% endfor %}"
)


def mistral():
    """30 layers, as the pipeline reads the 10th, 20th and 30th."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={"model_type": "mistral", "num_hidden_layers": 30, **TEXT},
        vision_config={
            "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
    )  # fmt: skip
    return Mistral3ForConditionalGeneration(config)


def qwen3():
    """27 layers, as the pipeline reads the 9th, 18th and 27th."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=27, **TEXT))


def autoencoder():
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        sample_size=32, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    return vae.eval().requires_grad_(False)


@functools.cache
def tiny_flux2(klein: bool = False):
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel

    torch.manual_seed(10)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=not klein,
    )  # fmt: skip
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATE
    pipe = (Flux2KleinPipeline if klein else Flux2Pipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=autoencoder(),
        text_encoder=(qwen3() if klein else mistral()).eval().requires_grad_(False),
        tokenizer=tokenizer,
        transformer=spread(transformer, 11, 0.05).requires_grad_(False),
    )
    pipe.default_sample_size = 16  # the classes have 128 for every model
    pipe.set_progress_bar_config(disable=True)
    return pipe
