"""The shipped value models, and the demo that shows them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from stitchvm_ext import TweedieValue, ValueEstimator
from stitchvm_ext.backbones import expand_rows
from stitchvm_ext.evaluation.compare import Contender
from stitchvm_ext.playground import experiments, load_pipeline, load_reward, load_value
from stitchvm_ext.playground.demo import run_demo
from stitchvm_ext.sampling.encoding import encode_condition

METHODS = ["unguided", "Tweedie-DPS", "StitchVM-DPS"]


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def reward():
    return load_reward("clip")


def test_stitched_value_reads_noisy_latents_better_than_the_vae_only_stitch(pipe, reward):
    data = experiments.held_out(pipe, reward, 256)
    stitched, vae_only = (
        experiments.noise_level_accuracy(load_value(pipe, vae_only=v), data, sigmas=(0.1, 0.25, 0.5))
        for v in (False, True)
    )
    for ours, theirs in zip(stitched, vae_only, strict=True):
        assert ours["cosine"] > theirs["cosine"] and ours["r_at_1"] > theirs["r_at_1"]
    clean = experiments.retrieval_at_1(data.embeddings, data.texts, data.own_texts)
    assert stitched[0]["r_at_1"] > 0.8 * clean and stitched[0]["spearman"] > 0.9


def test_null_text_is_the_pipelines_own(pipe):
    for vae_only in (False, True):
        value = load_value(pipe, vae_only=vae_only)
        expected = value.backbone.null_condition(pipe, **value.text_options)
        for name, row in expected.items():  # another processor rounds otherwise
            torch.testing.assert_close(value.null_condition[name], row, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("exact_rms_norm")
def test_shared_prefix_is_exact_in_float64():
    pipe = load_pipeline()
    value = load_value(pipe)
    pipe.transformer.double()
    value.double()
    condition = encode_condition(pipe, value.backbone, ["a red circle", "two blue rings"], [""] * 2, 3.0, {})
    condition = replace(condition, uncond=expand_rows(value.null_condition, 2))  # to the last bit
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert value.can_share(condition)
    shared = value.branches_with_value(latents, 0.5, condition)
    separate = ValueEstimator.branches_with_value(value, latents, 0.5, condition)
    for ours, theirs in zip(shared[:2], separate[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(shared[2:], separate[2:], strict=True):
        assert torch.equal(ours, theirs)


def test_guidance_raises_the_reward_that_it_follows(pipe, reward):
    methods = [
        Contender("unguided", None),
        Contender("Tweedie", TweedieValue(pipe, reward), {"strength": 0.25}),
        Contender("stitched", load_value(pipe), {"strength": 0.25}),
    ]
    results = experiments.compare_methods(
        pipe, methods, experiments.held_out_prompts(12), {"reward": reward}, num_inference_steps=12, guidance_scale=3.0
    )
    plain = results["unguided"].figures["reward"]
    for name in ("Tweedie", "stitched"):
        assert results[name].figures["reward"] > plain + 0.02


def test_demo_writes_pictures_numbers_and_a_table(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    figures = run_demo(out, num_prompts=2, num_inference_steps=2)
    assert list(figures) == METHODS
    assert {f.name for f in out.iterdir()} == {"grid.png", "value_accuracy.png", "results.json"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS) and str(out) in printed
    saved = json.loads((out / "results.json").read_text())
    assert saved["methods"] == figures and len(saved["prompts"]) == 2
    for name in ("grid.png", "value_accuracy.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 200 and len(set(image.convert("L").tobytes())) > 20


def test_demo_refuses_bad_numbers_before_it_starts(tmp_path):
    with pytest.raises(ValueError, match="prompts: expected at least 1, got 0"):
        run_demo(tmp_path / "out", num_prompts=0)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        run_demo(tmp_path / "out", num_inference_steps=0)
    assert not (tmp_path / "out").exists()
