"""Lumina-Image 2.0: where the image tokens of a joint sequence are, and the pipeline's own schedule and texts."""

from __future__ import annotations

import torch

from stitchvm_ext.backbones import backbone_of, stack_rows
from stitchvm_ext.sampling.schedule import pipeline_sigmas
from tests.tiny.lumina2 import tiny_lumina2

TEXTS = ["a ring", "two large blue rings left of a small red circle"]


def test_image_tokens_are_found_behind_texts_of_any_length():
    pipe = tiny_lumina2()
    b = backbone_of(pipe)
    z, sigma = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.8])
    alone = [b.encode_text(pipe, [text]) for text in TEXTS]
    lengths = [int(encoding["prompt_attention_mask"].sum()) for encoding in alone]
    assert lengths[0] < lengths[1]
    for depth in (1, b.depth):
        with torch.no_grad():
            both = b.features(z, sigma, stack_rows(alone), depth)
            for row, encoding in enumerate(alone):
                one = slice(row, row + 1)
                torch.testing.assert_close(both[one], b.features(z[one], sigma[one], encoding, depth))


def test_final_tokens_are_the_velocity_before_projection():
    """Tokens after the last block, normalised and projected, are the output's patches in row-major order."""
    pipe = tiny_lumina2()
    b = backbone_of(pipe)
    z, sigma = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.8])
    encoding = stack_rows([b.encode_text(pipe, [text]) for text in TEXTS])
    with torch.no_grad():
        tokens = b.features(z, sigma, encoding, b.depth)
        temb, _ = b.denoiser.time_caption_embed(z, 1 - sigma, encoding["prompt_embeds"])
        patches = b.denoiser.norm_out(tokens, temb).view(2, 8, 8, 2, 2, 4)  # row, column, dy, dx, channel
        image = patches.permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 16, 16)
        torch.testing.assert_close(b.velocity(z, sigma, encoding), -image)


def test_only_prompts_get_the_system_prompt():
    pipe = tiny_lumina2()
    b = backbone_of(pipe)
    words = len(pipe.system_prompt.split()) + 3  # "<Prompt Start>" and the space between
    prompt, negative = b.encode_text(pipe, ["a ring"]), b.encode_negative(pipe, ["a ring"])
    lengths = [int(encoding["prompt_attention_mask"].sum()) for encoding in (prompt, negative)]
    assert lengths[1] == 4 and lengths[0] == 4 + words - 1
    null = b.null_condition(pipe)
    assert all(torch.equal(null[name], b.encode_negative(pipe, [""])[name]) for name in null)


def test_dynamic_shifting_counts_what_the_pipeline_counts():
    pipe = tiny_lumina2(dynamic_shifting=True)
    sigmas = pipeline_sigmas(pipe, backbone_of(pipe), 4, (16, 16))
    pipe("a ring", num_inference_steps=4, output_type="latent", height=32, width=32)
    torch.testing.assert_close(sigmas, pipe.scheduler.sigmas.float())
