"""HPSv2's checkpoint and preprocessing, and DFN-CLIP's folder, against open_clip and torchvision."""

from __future__ import annotations

import json

import pytest
import torch

from stitchvm_ext import load_reward
from stitchvm_ext.rewards import reward_suffix_from_description

from ..tiny import rewards as tiny
from .contract import PROMPTS, assert_contract, assert_pixels_within_8_bits, images, pictures

open_clip = pytest.importorskip("open_clip")
transforms = pytest.importorskip("torchvision.transforms")
SIZES = [(32, 32), (64, 64), (40, 75), (91, 50), (20, 26), (32, 17)]


def hpsv2_transform(picture, side: int = 32) -> torch.Tensor:
    """As hpsv2 does it: a tensor first, its longest side resized, black around it, then normalised."""
    from torchvision.transforms import functional as tv

    x = tv.to_tensor(picture)
    scale = side / max(x.shape[1:])
    size = [round(length * scale) for length in x.shape[1:]]
    x = tv.resize(x, size, transforms.InterpolationMode.BICUBIC, antialias=True)
    rows, columns = side - size[0], side - size[1]
    x = tv.pad(x, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2], fill=0)
    return tv.normalize(x, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv2")
    return tiny.write_hpsv2(folder), folder / "HPS_v2.1_compressed.pt"


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_pixels_equal_the_references(hpsv2, size):
    reward = load_reward("hpsv2", hpsv2[1], model="tiny-hps")
    expected = torch.stack([hpsv2_transform(picture) for picture in pictures(images(*size))])
    torch.testing.assert_close(reward.preprocess(images(*size)), expected, atol=1e-5, rtol=0)


def test_hpsv2_contract(hpsv2):
    clip, checkpoint = hpsv2
    reward = load_reward("hpsv2", checkpoint, model="tiny-hps")
    x = images(40, 75)
    with torch.no_grad():
        image = clip.encode_image(torch.stack([hpsv2_transform(p) for p in pictures(x)]), normalize=True)
        text = clip.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS), normalize=True)
    assert_contract(reward, x, (image * text).sum(-1))
    assert reward.licence == "Apache-2.0" and reward.model_config["quick_gelu"] is False


def test_hpsv2_suffix_finds_its_text_tower(hpsv2, tmp_path, monkeypatch):
    monkeypatch.chdir(hpsv2[1].parent)
    reward = load_reward("hpsv2", hpsv2[1].name, model="tiny-hps")
    monkeypatch.chdir(tmp_path)  # a relative path was made a full one
    suffix = reward_suffix_from_description(json.loads(json.dumps(reward.describe())), 2)
    assert torch.equal(suffix.encode_condition(PROMPTS), reward.encode_condition(PROMPTS))


def test_hpsv2_model_is_the_real_one_by_default(hpsv2):
    with pytest.raises(OSError, match="path: expected a checkpoint file such as HPS_v2.1_compressed.pt"):
        load_reward("hpsv2", hpsv2[1].parent)
    config = open_clip.get_model_config("ViT-H-14")
    assert not config.get("quick_gelu", False) and config["vision_cfg"]["width"] == 1280


# ------------------------------------------------------------------------------------------------------------- DFN-CLIP


@pytest.mark.parametrize("said", [True, False], ids=["folder says squash", "folder does not say"])
def test_dfn_clip(tmp_path, said):
    clip = tiny.write_open_clip(tmp_path, {"resize_mode": "squash"} if said else None, quick_gelu=True)
    reward = load_reward("dfn-clip", tmp_path)
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(PROMPTS)
    with torch.no_grad():
        text = clip.encode_text(ids, normalize=True)
        image = clip.encode_image(reward.preprocess(images()), normalize=True)
    assert_contract(reward, images(), (image * text).sum(-1))
    config = open_clip.transform.PreprocessCfg(size=32, resize_mode="squash", interpolation="bicubic")
    transform = open_clip.transform.image_transform_v2(config, is_train=False)
    for size in SIZES:
        expected = torch.stack([transform(picture) for picture in pictures(images(*size))])
        assert_pixels_within_8_bits(reward.preprocess(images(*size)), expected, reward.std, largest=6)


def test_dfn_clip_wants_quick_gelu(tmp_path):
    tiny.write_open_clip(tmp_path)
    with pytest.raises(ValueError, match='expected "quick_gelu": true'):
        load_reward("dfn-clip", tmp_path)
