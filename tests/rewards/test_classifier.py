"""Dinov2Reward against transformers, TimmReward against timm, on small random classifiers in their own folders."""

from __future__ import annotations

import json

import pytest
import torch

from stitchvm_ext import load_reward
from stitchvm_ext.rewards import TimmReward, reward_suffix_from_description
from stitchvm_ext.rewards.classifier import class_index

from ..tiny import rewards as tiny
from .contract import assert_contract, assert_pixels_within_8_bits, images, pictures

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")


def test_class_index():
    names = {i: [text] for i, text in tiny.LABELS.items()}
    assert class_index(names, 3) == 3 and class_index(names, "Square") == 1
    assert class_index(names, "circle, disc") == 0 and class_index(names, "plate") == 3
    with pytest.raises(ValueError, match=r"'disc', which is of the classes \[0, 3\]"):
        class_index(names, "disc")
    with pytest.raises(ValueError, match="a name such as .*'square'.*got 'cube'"):
        class_index(names, "cube")
    with pytest.raises(ValueError, match=r"a class in 0..4, got 5"):
        class_index(names, 5)


# --------------------------------------------------------------------------------------------------------------- dinov2


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2")
    tiny.write_dinov2(path)
    return path


def test_dinov2_contract(dinov2):
    model = transformers.Dinov2ForImageClassification.from_pretrained(dinov2, dtype=torch.float32).eval()
    reward = load_reward("dinov2", dinov2, label="square")
    with torch.no_grad():
        logits = model(reward.preprocess(images())).logits
    assert_contract(reward, images(), logits[:, 1])
    assert (reward.num_prefix_tokens, reward.pooled_tokens, reward.distillation) == (1, None, "score")
    log_probability = load_reward("dinov2", dinov2, label=2, score_as="log_probability")
    with torch.no_grad():
        got = log_probability(images())
    torch.testing.assert_close(got, logits.log_softmax(-1)[:, 2], atol=1e-5, rtol=0)
    suffix = log_probability.suffix(2)
    assert suffix.settings == {"class_index": 2, "score_as": "log_probability"}
    assert suffix.position is None and not any("patch" in name for name in suffix.state_dict())


def test_dinov2_swiglu(tmp_path):
    model = tiny.write_dinov2(tmp_path, use_swiglu_ffn=True)
    reward = load_reward("dinov2", tmp_path, label=0)
    with torch.no_grad():
        expected = model(reward.preprocess(images())).logits[:, 0]
    assert_contract(reward, images(), expected)


@pytest.mark.parametrize("size", [(36, 36), (72, 72), (40, 75), (91, 50)])
def test_dinov2_preprocessing_equals_the_processors(dinov2, size):
    """The resize aims at 36, the crop at 32; images of 36x36 are only cropped."""
    reward = load_reward("dinov2", dinov2, label=0)
    expected = transformers.BitImageProcessor.from_pretrained(dinov2)(pictures(images(*size)), return_tensors="pt")
    got = reward.preprocess(images(*size))
    assert_pixels_within_8_bits(got, expected["pixel_values"], reward.std)
    if size == (36, 36):
        torch.testing.assert_close(got, expected["pixel_values"], atol=1e-5, rtol=0)


def test_dinov2_errors(dinov2, tmp_path):
    with pytest.raises(ValueError, match="label: .*got 'cube'"):
        load_reward("dinov2", dinov2, label="cube")
    with pytest.raises(ValueError, match="score_as: expected one of"):
        load_reward("dinov2", dinov2, label=0, score_as="cosine")
    model = transformers.Dinov2ForImageClassification.from_pretrained(dinov2)
    model.dinov2.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no weights for .*classifier.bias"):
        load_reward("dinov2", tmp_path, label=0)


# ----------------------------------------------------------------------------------------------------------------- timm

TOWERS = {
    "class token": {},
    "registers, positions for patches only": {"reg_tokens": 4, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 2},
    "average pooling, norm after it": {"global_pool": "avg"},
    "no class token, attention pooling": {"class_token": False, "global_pool": "map"},
    "norm before the blocks, layer scale": {"pre_norm": True, "init_values": 0.1},
    "any image size": {"dynamic_img_size": True},
    "distilled": {"architecture": "deit_tiny_distilled_patch16_224"},
}


@pytest.mark.parametrize("tower", TOWERS)
def test_timm_contract(tmp_path, tower):
    vit = tiny.write_timm(tmp_path, **TOWERS[tower])
    reward = load_reward("timm", tmp_path, label="square")
    with torch.no_grad():
        expected = vit(reward.preprocess(images()))[:, 1]
    assert_contract(reward, images(), expected)
    assert reward.num_prefix_tokens == vit.num_prefix_tokens


def test_timm_log_probability_and_labels(tmp_path):
    vit = tiny.write_timm(tmp_path)
    reward = load_reward("timm", tmp_path, label="star", score_as="log_probability")
    with torch.no_grad():
        torch.testing.assert_close(
            reward(images()), vit(reward.preprocess(images())).log_softmax(-1)[:, 4], atol=1e-5, rtol=0
        )


def test_timm_model_by_name_with_a_weights_file(tmp_path):
    """ImageNet's names, and the licence that timm knows."""
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    vit = tiny.spread(timm.create_model("vit_tiny_patch16_224", **args), 1)
    torch.save(vit.state_dict(), tmp_path / "weights.pth")
    reward = load_reward(
        "timm", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", label="tabby cat", pretrained=tmp_path / "weights.pth",
        **args, pretrained_cfg_overlay={"input_size": (3, 32, 32)},
    )  # fmt: skip
    assert reward.class_index == 281 and reward.licence == "apache-2.0"
    with torch.no_grad():
        torch.testing.assert_close(reward(images()), vit(reward.preprocess(images()))[:, 281], atol=1e-5, rtol=0)
    description = json.loads(json.dumps(reward.describe()))
    assert reward_suffix_from_description(description, 2).describe() == description


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(64, 64), (40, 75), (91, 50)])
def test_timm_preprocessing_equals_timms_transform(tmp_path, mode, size):
    vit = tiny.write_timm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"crop_mode": mode, "crop_pct": 0.8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reward = load_reward("timm", tmp_path, label=0)
    data = {**timm.data.resolve_model_data_config(vit), "crop_mode": mode, "crop_pct": 0.8, "input_size": (3, 32, 32)}
    transform = timm.data.create_transform(**data, is_training=False)
    expected = torch.stack([transform(picture) for picture in pictures(images(*size))])
    got = reward.preprocess(images(*size))
    assert_pixels_within_8_bits(got, expected, reward.std, largest=6 if mode == "squash" else 1.5)


def test_timm_errors(tmp_path):
    with pytest.raises(OSError, match="expected config.json and model.safetensors"):
        load_reward("timm", tmp_path, label=0)
    with pytest.raises(OSError, match="'no_such_vit': cannot be loaded"):
        load_reward("timm", "no_such_vit", label=0)
    with pytest.raises(OSError, match="pretrained: expected an existing weights file"):
        load_reward("timm", "vit_tiny_patch16_224", label=0, pretrained=tmp_path / "none.pth")
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    for architecture, more, error, message in (
        ("resnet18", {}, TypeError, "expected timm's VisionTransformer, got ResNet"),
        ("vit_tiny_patch16_224", {**args, "num_classes": 0}, ValueError, "with a classifier, got one with 0 classes"),
        ("vit_tiny_patch16_224", args, ValueError, r"for images of \(224, 224\).*got \(32, 32\)"),
    ):
        vit = timm.create_model(architecture, **more)
        torch.save(vit.state_dict(), tmp_path / "weights.pth")
        with pytest.raises(error, match=message):
            TimmReward.from_pretrained(architecture, 0, tmp_path / "weights.pth", **more)
    vit = tiny.write_timm(tmp_path / "border")
    config = json.loads((tmp_path / "border" / "config.json").read_text())
    config["pretrained_cfg"]["crop_mode"] = "border"
    (tmp_path / "border" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected crop_mode 'center' or 'squash', got 'border'"):
        load_reward("timm", tmp_path / "border", label=0)
