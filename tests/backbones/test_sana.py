"""Sana: the instruction that prompts get, and the models that are another process."""

from __future__ import annotations

import pytest
import torch

from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.sampling.schedule import pipeline_sigmas
from tests.tiny.sana import tiny_sana


def test_texts_are_those_of_the_pipelines_call(monkeypatch):
    pipe = tiny_sana()
    seen = {}
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda *a, **k: seen.setdefault("texts", encode(*a, **k)))
    pipe("a ring", num_inference_steps=1, output_type="latent", height=32, width=32, **pipe.test_options)
    monkeypatch.undo()
    b = backbone_of(pipe)
    prompt, null = b.encode_text(pipe, ["a ring"]), b.null_condition(pipe)
    names = ("prompt_embeds", "prompt_attention_mask")
    for got, expected in zip([prompt[n] for n in names] + [null[n] for n in names], seen["texts"], strict=True):
        torch.testing.assert_close(got, expected)
    assert not torch.equal(b.encode_text(pipe, [""])["prompt_embeds"], null["prompt_embeds"])


def test_noise_levels_of_the_real_scheduler(monkeypatch):
    from diffusers import DPMSolverMultistepScheduler

    pipe = tiny_sana()
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    monkeypatch.setattr(pipe, "scheduler", DPMSolverMultistepScheduler(**flow))
    sigmas = pipeline_sigmas(pipe, backbone_of(pipe), 5, (16, 16))
    assert len(sigmas) == 6 and sigmas[0] > 0.99 and sigmas[-1] == 0


def test_sana_sprint_is_refused():
    from diffusers import SanaTransformer2DModel

    sprint = SanaTransformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_cross_attention_heads=1,
        cross_attention_head_dim=8, cross_attention_dim=8, caption_channels=8, guidance_embeds=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="Sana-Sprint"):
        backbone_of(sprint)
