"""The playground's networks, built from the field's own classes: diffusers, transformers and open_clip."""

from __future__ import annotations

from . import world

MAX_TOKENS = 12  # the longest captions have 9 words, and two marks
WORDS = (
    "<pad>", "<bos>", "a", "and", "two", "three", "small", "large",
    *world.COLORS, *world.SHAPES, *world.PLURALS.values(), "<eos>",
)  # fmt: skip
PAD_ID, BOS_ID, EOS_ID = WORDS.index("<pad>"), WORDS.index("<bos>"), WORDS.index("<eos>")

LATENT_CHANNELS, LATENT_SIZE = 4, 16
# Of FlowMatchEulerDiscreteScheduler's sigmas. SD3.5's own; chosen among 1, 2 and 3 on captions of another seed.
SCHEDULER_SHIFT = 3.0
TEXT_WIDTH = 96  # of each of the two text encoders; the transformer reads both side by side

# open_clip's own configuration format, as in its model_configs/*.json
CLIP_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": world.SIZE, "patch_size": 8, "width": 128, "layers": 6, "head_width": 32},
    "text_cfg": {"context_length": MAX_TOKENS, "vocab_size": len(WORDS), "width": 128, "heads": 4, "layers": 3},
}


def build_tokenizer():
    """A word-level tokenizer of the captions' 25 words: ``<bos> words <eos>``, padded to 12 ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS_ID), ("<eos>", EOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=MAX_TOKENS
    )


def tokenize(tokenizer, captions: list[str]):
    """Token ids [B, 16] of captions, padded as both text towers expect them."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


def build_autoencoder():
    """64x64 RGB <-> 4x16x16. One normalisation group: with more, so few channels lose their absolute colour."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer():
    """An SD3.5-Medium in miniature: rms query-key norm, dual attention in the first two of six blocks."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        out_channels=LATENT_CHANNELS,
        pos_embed_max_size=LATENT_SIZE // 2,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def build_text_encoder():
    """One of the generator's two text encoders, trained together with it."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
    )


def build_aesthetic_head():
    """A scalar head on the CLIP's normalised embedding, as the LAION predictor has it."""
    from ..rewards.scalar_head import ScalarHead

    return ScalarHead({0: (64, CLIP_CONFIG["embed_dim"]), 2: (1, 64)}, activation="gelu")
