"""SiglipReward against transformers' SiglipModel and SiglipImageProcessor, on a small random folder."""

from __future__ import annotations

import json

import pytest
import torch

from stitchvm_ext import load_reward
from stitchvm_ext.playground import models
from stitchvm_ext.rewards import reward_suffix_from_description

from ..tiny import rewards as tiny
from .contract import PROMPTS, assert_contract, assert_pixels_within_8_bits, images, pictures

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("siglip")
    tiny.write_siglip(path)
    return path


def test_contract_and_scores(folder):
    siglip = transformers.SiglipModel.from_pretrained(folder, dtype=torch.float32).eval()
    reward = load_reward("siglip", folder)
    pixels = transformers.SiglipImageProcessor.from_pretrained(folder)(pictures(images()), return_tensors="pt")
    assert torch.allclose(reward.preprocess(images()), pixels["pixel_values"], atol=1e-5, rtol=0)
    tokens = models.build_tokenizer()(PROMPTS, padding="max_length", max_length=models.MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        whole = siglip(
            pixel_values=pixels["pixel_values"], input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
    logits = whole.logits_per_image.diagonal()
    assert_contract(reward, images(), logits)
    assert reward.num_prefix_tokens == 0 and reward.pooled_tokens is None
    with torch.no_grad():
        probability = load_reward("siglip", folder, score_as="probability")(images(), PROMPTS)
        cosine = load_reward("siglip", folder, score_as="cosine")(images(), PROMPTS)
    torch.testing.assert_close(probability, logits.sigmoid(), atol=1e-5, rtol=0)
    torch.testing.assert_close(cosine, (whole.image_embeds * whole.text_embeds).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (40, 75), (20, 26)])
def test_preprocessing_equals_the_processors_within_8_bits(folder, size):
    reward = load_reward("siglip", folder)
    expected = transformers.SiglipImageProcessor.from_pretrained(folder)(pictures(images(*size)), return_tensors="pt")
    assert_pixels_within_8_bits(reward.preprocess(images(*size)), expected["pixel_values"], reward.std, largest=6)


def test_suffix_finds_its_text_tower_when_first_asked(folder):
    reward = load_reward("siglip", folder)
    suffix = reward_suffix_from_description(json.loads(json.dumps(reward.describe())), 1)
    assert suffix.text.tower is None
    assert torch.equal(suffix.encode_condition(PROMPTS), reward.encode_condition(PROMPTS))


def test_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="score_as: expected one of .*'probability'.*, got 'log'"):
        load_reward("siglip", folder, score_as="log")
    config = transformers.SiglipConfig(
        text_config={**tiny.TEXT, "projection_size": tiny.WIDTH},
        vision_config={**tiny.VISION, "vision_use_head": False},
    )
    transformers.SiglipModel(config).save_pretrained(tmp_path)
    models.build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected vision_use_head"):
        load_reward("siglip", tmp_path)
