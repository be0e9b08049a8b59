"""Qwen-Image: 64x64 images, 4x8x8 latents of a video autoencoder, 16 image tokens; three blocks."""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models

from . import spread

SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")
CHAT_WORDS = (*models.WORDS, *SPECIAL, "user", "assistant", "system")


def chat_tokenizer():
    """The words of the playground's captions and the marks of a chat, of whatever length."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({word: i for i, word in enumerate(CHAT_WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=list(SPECIAL[1:])
    )


def text_encoder():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(6)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(CHAT_WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def autoencoder(channels: int = 4):
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(7)
    return (
        AutoencoderKLQwenImage(
            base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1 * c for c in range(channels)], latents_std=[0.5 + 0.25 * c for c in range(channels)],
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


@functools.cache
def tiny_qwen_image():
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(8)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(  # its own, in miniature
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02,
            time_shift_type="exponential",
        ),
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=chat_tokenizer(),
        transformer=spread(transformer, 9, 0.05).requires_grad_(False),
    )  # fmt: skip
    head = pipe.prompt_template_encode.split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(head).input_ids)  # 34 with the real tokenizer
    pipe.default_sample_size = 8  # the class has 128 for every model
    pipe.set_progress_bar_config(disable=True)
    # Guidance is asked for by another name, and needs a negative prompt.
    pipe.test_options = {"guidance_scale": None, "true_cfg_scale": 4.0, "negative_prompt": ["", ""]}
    return pipe
