"""Wan 2.1: sizes of videos, the scheduler of the real pipeline, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from stitchvm_ext import guided_sample
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.sampling.schedule import pipeline_sigmas
from tests.tiny.wan import tiny_wan


def test_sizes_are_the_pipelines():
    pipe = tiny_wan()
    b = backbone_of(pipe)
    assert b.latent_size(pipe) == (60, 104)  # 480 x 832
    assert b.latent_size(pipe, height=720, width=1280) == (90, 160)
    assert [b.latent_frames(pipe, n) for n in (1, 5, 81)] == [1, 2, 21]
    with pytest.raises(ValueError, match="num_frames: expected 1 . a multiple of 4, got 6"):
        b.latent_frames(pipe, 6)
    with pytest.raises(ValueError, match="height and width to be multiples of 2"):
        b.grid((9, 8))


def test_videos_are_encoded_by_frames_of_latents():
    pipe = tiny_wan()
    b = backbone_of(pipe)
    video = torch.rand(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(1))
    z = b.encode_images(pipe.vae, video)
    assert z.shape == (1, 4, 2, 8, 8)
    # The first latent frame is the first image's alone: the autoencoder is causal.
    torch.testing.assert_close(z[:, :, :1], b.encode_images(pipe.vae, video[:, :, 0]))
    assert b.decode_latents(pipe.vae, z).shape == video.shape


def test_frames_of_the_output():
    out = guided_sample(
        tiny_wan(), None, "a ring", num_frames=5, height=64, width=64, num_inference_steps=1, output_type="pt",
        progress=False,
    )  # fmt: skip
    assert out.images.shape == (1, 5, 3, 64, 64) and out.latents.shape == (1, 4, 2, 8, 8)


def test_noise_levels_of_the_real_scheduler(monkeypatch):
    pipe = tiny_wan()
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    monkeypatch.setattr(pipe, "scheduler", UniPCMultistepScheduler(**flow))
    sigmas = pipeline_sigmas(pipe, backbone_of(pipe), 5, (8, 8))
    assert len(sigmas) == 6 and sigmas[0] > 0.99 and sigmas[-1] == 0


def test_weights_that_stay_in_float32(tmp_path):
    """Loaded in bfloat16, some of the model's weights, its first among them, are float32."""
    b = backbone_of(tiny_wan())
    b.denoiser.save_pretrained(tmp_path)
    half = backbone_of(WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 != next(half.denoiser.parameters()).dtype
    z, sigma = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.4])
    encoding = b.encode_text(tiny_wan(), ["a ring"], max_sequence_length=12)
    with torch.no_grad():
        exact, rounded = (x.velocity(z, sigma, encoding) for x in (b, half))
        assert half.features(z, sigma, encoding, 2).dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_other_wan_models_are_refused():
    small = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "ffn_dim": 8, "rope_max_seq_len": 8}
    with pytest.raises(ValueError, match="conditioned on an image"):
        backbone_of(WanTransformer3DModel(in_channels=9, out_channels=4, **small))
    pipe = tiny_wan()
    try:
        pipe.register_to_config(boundary_ratio=0.9)
        with pytest.raises(ValueError, match="boundary_ratio 0.9"):
            backbone_of(pipe)
    finally:
        pipe.register_to_config(boundary_ratio=None)
