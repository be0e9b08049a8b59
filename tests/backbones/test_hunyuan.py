"""HunyuanImage and HunyuanVideo: texts, distilled guidance, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import HunyuanImageTransformer2DModel, HunyuanVideoTransformer3DModel

from stitchvm_ext import guided_sample
from stitchvm_ext.backbones import backbone_of
from tests.tiny.hunyuan_image import tiny_hunyuan_image
from tests.tiny.hunyuan_video import tiny_hunyuan_video

SMALL = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "attention_head_dim": 8}
SMALL |= {"num_attention_heads": 1, "text_embed_dim": 8, "in_channels": 4, "out_channels": 4}


def test_text_in_quotation_marks_is_read_by_its_glyphs():
    pipe = tiny_hunyuan_image()
    b = backbone_of(pipe)
    plain, quoted = (b.encode_text(pipe, [text]) for text in ("a red circle", 'a "red" circle'))
    assert not plain["prompt_embeds_mask_2"].any() and quoted["prompt_embeds_mask_2"].any()
    z = torch.randn(1, 4, 16, 16)
    without = {**quoted, "prompt_embeds_mask_2": torch.zeros_like(quoted["prompt_embeds_mask_2"])}
    with torch.no_grad():
        assert not torch.allclose(b.velocity(z, 0.5, quoted), b.velocity(z, 0.5, without), atol=1e-5)


def test_guidance_is_an_input_of_distilled_models_alone():
    base, distilled = backbone_of(tiny_hunyuan_image()), backbone_of(tiny_hunyuan_image(distilled=True))
    assert not base.distilled_guidance and base.text_options == ()
    assert "guidance" not in base.encode_text(tiny_hunyuan_image(), ["a ring"])
    assert distilled.distilled_guidance and distilled.text_options == ("guidance",)
    video = backbone_of(tiny_hunyuan_video())
    for b, pipe in ((distilled, tiny_hunyuan_image(distilled=True)), (video, tiny_hunyuan_video())):
        low, high = (b.encode_text(pipe, ["a ring"], guidance=scale) for scale in (1.0, 6.0))
        z = torch.randn(1, 4, 2, 8, 8) if b.is_video else torch.randn(1, 4, 16, 16)
        with torch.no_grad():
            assert not torch.allclose(b.velocity(z, 0.5, low), b.velocity(z, 0.5, high), atol=1e-5)


def test_a_mean_flow_is_asked_for_the_velocity_at_one_time():
    model = HunyuanImageTransformer2DModel(
        **SMALL, rope_axes_dim=(4, 4), text_embed_2_dim=8, guidance_embeds=True, use_meanflow=True
    )
    b = backbone_of(model)
    encoding = {
        "prompt_embeds": torch.randn(1, 3, 8), "prompt_embeds_mask": torch.ones(1, 3, dtype=torch.int64),
        "prompt_embeds_2": torch.randn(1, 2, 8), "prompt_embeds_mask_2": torch.ones(1, 2, dtype=torch.int64),
        "guidance": torch.tensor([3.0]),
    }  # fmt: skip
    call = b.inputs(torch.randn(1, 4, 4, 4), torch.tensor([0.25]), encoding)
    assert call["timestep"].item() == call["timestep_r"].item() == 250 and call["guidance"].item() == 3000
    with torch.no_grad():
        model(**call)


def test_true_guidance_of_videos_is_the_pipelines():
    pipe = tiny_hunyuan_video()
    options = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64, "num_frames": 5}
    options |= {"guidance_scale": 4.0, "true_cfg_scale": 2.0, "negative_prompt": "a small ring"}
    generator = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    ours = guided_sample(pipe, None, "a red circle", generator=generator(), progress=False, **options)
    expected = pipe("a red circle", generator=generator(), **options).frames
    torch.testing.assert_close(torch.as_tensor(ours.images), torch.as_tensor(expected), rtol=1e-3, atol=2e-3)


def test_sizes_of_videos():
    pipe = tiny_hunyuan_video()
    b = backbone_of(pipe)
    assert b.latent_size(pipe) == (90, 160)  # 720 x 1280
    assert [b.latent_frames(pipe, n) for n in (1, 129)] == [1, 33]


def test_other_hunyuan_models_are_refused():
    with pytest.raises(ValueError, match="the refiner"):
        backbone_of(HunyuanImageTransformer2DModel(**SMALL, patch_size=(1, 1, 1), rope_axes_dim=(4, 2, 2)))
    with pytest.raises(ValueError, match="conditioned on an image"):
        backbone_of(
            HunyuanVideoTransformer3DModel(
                **SMALL, pooled_projection_dim=8, rope_axes_dim=(4, 2, 2), image_condition_type="token_replace"
            )
        )
