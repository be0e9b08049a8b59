"""HFClipReward (PickScore) against transformers' CLIPModel and CLIPProcessor, on a small random folder."""

from __future__ import annotations

import json

import pytest
import torch

from stitchvm_ext import load_reward
from stitchvm_ext.playground import models
from stitchvm_ext.rewards import HFClipReward, reward_suffix_from_description

from ..tiny import rewards as tiny
from .contract import PROMPTS, assert_contract, assert_pixels_within_8_bits, images, pictures

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pickscore")
    tiny.write_pickscore(path)
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def reference_scores(clip, pixels):
    """As PickScore's page computes it, and the cosine."""
    tokens = models.build_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    inputs = {k: tokens[k] for k in ("input_ids", "attention_mask")}
    logits = clip(pixel_values=pixels, **inputs).logits_per_image.diagonal()
    return logits, logits / clip.logit_scale.exp()


def test_contract_and_published_score(folder, clip):
    reward = load_reward("pickscore", folder)
    pixels = transformers.CLIPImageProcessor.from_pretrained(folder)(pictures(images()), return_tensors="pt")
    assert torch.allclose(reward.preprocess(images()), pixels["pixel_values"], atol=1e-5, rtol=0)
    logits, cosine = reference_scores(clip, pixels["pixel_values"])
    assert_contract(reward, images(), logits)
    plain = load_reward("pickscore", folder, score_as="cosine")
    torch.testing.assert_close(plain(images(), PROMPTS), cosine, atol=1e-5, rtol=0)
    assert (reward.num_prefix_tokens, reward.pooled_tokens, reward.distillation) == (1, (0,), "embedding")
    assert reward.describe()["licence"] == "MIT"


@pytest.mark.parametrize("size", [(64, 64), (40, 75), (91, 50), (20, 26), (35, 32)])
def test_preprocessing_equals_the_processors_within_8_bits(folder, size):
    reward = load_reward("pickscore", folder)
    expected = transformers.CLIPImageProcessor.from_pretrained(folder)(pictures(images(*size)), return_tensors="pt")
    assert_pixels_within_8_bits(reward.preprocess(images(*size)), expected["pixel_values"], reward.std)


def test_a_bare_folder_gets_clips_own_preprocessing_and_the_option_its_tokenizer(folder, clip, tmp_path):
    clip.save_pretrained(tmp_path / "bare")
    with pytest.raises(OSError, match=r"tokenizer '.*bare': expected tokenizer.json"):
        load_reward("pickscore", tmp_path / "bare")
    bare = load_reward("pickscore", tmp_path / "bare", tokenizer=folder)
    whole = load_reward("pickscore", folder)
    assert bare.preprocess_config == whole.preprocess_config
    assert torch.equal(bare(images(64, 50), PROMPTS), whole(images(64, 50), PROMPTS))
    suffix = reward_suffix_from_description(bare.describe(), 2)
    assert torch.equal(suffix.encode_condition(PROMPTS), whole.encode_condition(PROMPTS))


def test_clips_vocabulary_needs_no_tokenizer_files(tmp_path):
    text = {**tiny.TEXT, "vocab_size": 49408, "hidden_size": 8, "max_position_embeddings": 77}
    text |= {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=tiny.VISION, projection_dim=16)
    clip = tiny.spread(transformers.CLIPModel(config), 0)
    clip.save_pretrained(tmp_path)
    got = load_reward("pickscore", tmp_path).encode_condition(PROMPTS)
    ids = pytest.importorskip("open_clip").get_tokenizer("ViT-H-14")(PROMPTS)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(clip.get_text_features(input_ids=ids).pooler_output, dim=-1)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_suffix_finds_its_text_tower_when_first_asked(folder):
    reward = HFClipReward.from_pretrained(folder)
    suffix = reward_suffix_from_description(json.loads(json.dumps(reward.describe())), 2)
    assert suffix.text.tower is None and reward.suffix(2).text is reward.text
    assert torch.equal(suffix.encode_condition(PROMPTS), reward.encode_condition(PROMPTS))
    first = dict(reward.text.cache)
    reward.text.tower = None  # what is cached is not asked again
    assert torch.equal(reward.encode_condition(PROMPTS[1:2])[0], first[PROMPTS[1]])


def test_projection_width_is_the_whole_models(tmp_path):
    """The image tower's configuration may name another width than the model that it belongs to."""
    config = transformers.CLIPConfig(text_config=tiny.TEXT, vision_config=tiny.VISION, projection_dim=12)
    config.vision_config.projection_dim = 512
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    models.build_tokenizer().save_pretrained(tmp_path)
    reward = load_reward("pickscore", tmp_path)
    assert reward.embed_dim == 12 and reward.suffix(3).projection.weight.shape == (12, tiny.WIDTH)


def test_errors(folder, clip, tmp_path):
    with pytest.raises(ValueError, match=r"score_as: expected one of \('logit', 'cosine'\), got 'loud'"):
        load_reward("pickscore", folder, score_as="loud")
    with pytest.raises(OSError, match="/no/such/folder.*cannot be loaded"):
        load_reward("pickscore", "/no/such/folder")
    tiny.write_siglip(tmp_path / "siglip")
    with pytest.raises(OSError, match="expected model_type 'clip', got 'siglip'"):
        load_reward("pickscore", tmp_path / "siglip")
    state = clip.state_dict()
    del state["visual_projection.weight"]
    clip.save_pretrained(tmp_path / "partial", state_dict=state)
    with pytest.raises(OSError, match=r"CLIPModel has no weights for \['visual_projection.weight'\]"):
        load_reward("pickscore", tmp_path / "partial")
    tiny.write_pickscore(tmp_path / "other")
    file = tmp_path / "other" / "preprocessor_config.json"
    processor = json.loads(file.read_text())
    for change, message in (
        ({"resample": 0}, "expected resample 2 or 3"),
        ({"do_rescale": False}, "expected do_resize, and do_rescale by 1/255"),
        ({"do_center_crop": False}, "expected do_center_crop"),
        ({"crop_size": {"height": 64, "width": 64}}, "expected an image size of 16 patches, the network's own"),
    ):
        file.write_text(json.dumps({**processor, **change}))
        with pytest.raises(ValueError, match=message):
            load_reward("pickscore", tmp_path / "other")
    file.write_text("{")
    with pytest.raises(OSError, match="image processor cannot be loaded"):
        load_reward("pickscore", tmp_path / "other")
    reward = load_reward("pickscore", folder)
    with pytest.raises(ValueError, match="prompts: .* got None"):
        reward(images())
    with pytest.raises(ValueError, match=r"text embeddings \[B, 16\]"):
        reward.encode_condition(torch.randn(2, 17))
