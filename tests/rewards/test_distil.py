"""distil_reward: closed-form black boxes met on held-out images, and a result that is a reward like any other."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from open_clip.model import CLIP

from stitchvm_ext import StitchedValue, stitch
from stitchvm_ext.backbones import Condition, backbone_of
from stitchvm_ext.evaluation import spearman
from stitchvm_ext.playground import models, train
from stitchvm_ext.rewards import (
    DistilConfig,
    DistilledReward,
    OpenClipReward,
    RewardSum,
    distil_reward,
    reward_suffix_from_description,
)
from stitchvm_ext.value import FinetuneConfig
from tests import tiny

CONFIG = DistilConfig(epochs=40, batch_size=32, hidden=64, learning_rate=3e-3)
PROMPTS = ["a red circle", "a green circle"]


def images(count: int = 320, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")


def redness(images, prompts=None):
    return images[:, 0].mean((1, 2)) * 40 + 100


def channel_of_prompt(images, prompts):
    return [image[PROMPTS.index(p)].mean().item() for image, p in zip(images, prompts, strict=True)]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """From a folder in open_clip's format, so that it has a reference."""
    torch.manual_seed(2)
    config = {**copy.deepcopy(models.CLIP_CONFIG)}
    path = tmp_path_factory.mktemp("weights") / "clip"
    train.save_reward(CLIP(**config), models.build_aesthetic_head(), path)
    return OpenClipReward.from_pretrained(path, licence="Tower Licence")


@pytest.fixture(scope="module")
def reward(student):
    return distil_reward(redness, student, images(), config=CONFIG, licence="Box Licence", progress=False)


def test_held_out_images_meet_the_black_box(reward):
    assert reward.report["images"] == 288 and reward.report["held-out images"] == 32
    assert reward.report["held-out Spearman"] > 0.9
    assert reward.report["held-out R2"] > 0.8
    fresh = torch.nn.functional.interpolate(
        torch.rand(100, 3, 4, 4, generator=torch.Generator().manual_seed(9)), size=32, mode="bilinear"
    )
    with torch.no_grad():
        assert (reward(fresh) - redness(fresh)).abs().mean() < 0.5 * redness(
            fresh
        ).std()  # on the black box's own scale
    assert reward.licence == "Tower Licence and Box Licence"
    assert not any(p.requires_grad for p in reward.parameters())


def test_same_seed_same_head(reward, student):
    again = distil_reward(redness, student, (images() * 255).byte(), config=CONFIG, progress=False)
    once_more = distil_reward(redness, student, (images() * 255).byte(), config=CONFIG, progress=False)
    assert all(torch.equal(t, once_more.state_dict()[name]) for name, t in again.state_dict().items())
    assert again.report["held-out Spearman"] > 0.9


def test_with_prompts(student):
    x = images(480)
    prompts = [PROMPTS[k % 2] for k in range(len(x))]
    config = DistilConfig(epochs=40, batch_size=32, hidden=64, learning_rate=3e-3, held_out=0.2)
    reward = distil_reward(channel_of_prompt, student, x, prompts, config=config, progress=False)
    assert reward.report["held-out Spearman"] > 0.9
    assert reward.distillation == "embedding"
    with torch.no_grad():
        red, green = (reward(x[:50], [p] * 50) for p in PROMPTS)
        assert spearman(red - green, x[:50, 0].mean((1, 2)) - x[:50, 1].mean((1, 2))) > 0.8
    with pytest.raises(ValueError, match="one prompt per image, got None"):
        reward(x[:2])


def test_a_trained_tower_is_a_copy_and_is_saved(student, tmp_path):
    before = copy.deepcopy(student.state_dict())
    config = DistilConfig(epochs=1, batch_size=32, hidden=16, tower_learning_rate=1e-4)
    reward = distil_reward(redness, student, images(96), config=config, progress=False)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())
    assert not torch.equal(reward.tower.visual.proj, student.visual.proj)
    reward.save_pretrained(tmp_path)
    with torch.no_grad():
        for again in (DistilledReward.from_pretrained(tmp_path), DistilledReward.from_pretrained(tmp_path, student)):
            assert torch.equal(again(images(4)), reward(images(4)))
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())


def test_folder_round_trip(reward, tmp_path):
    reward.save_pretrained(tmp_path / "reward")
    again = DistilledReward.from_pretrained(tmp_path / "reward")
    with torch.no_grad():
        assert torch.equal(again(images(4)), reward(images(4)))
    assert again.describe() == json.loads(json.dumps(reward.describe()))
    assert sorted(f.name for f in (tmp_path / "reward").iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "reward" / "model.safetensors").stat().st_size < 100_000  # the head alone
    (tmp_path / "reward" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(OSError, match="expected a distilled reward"):
        DistilledReward.from_pretrained(tmp_path / "reward")


def test_a_tower_loaded_with_options_is_not_taken_for_another(student, tmp_path):
    squashing = copy.deepcopy(student)
    squashing.preprocess_config = {**squashing.preprocess_config, "resize_mode": "squash"}
    config = DistilConfig(epochs=1, batch_size=32, hidden=16)
    reward = distil_reward(redness, squashing, images(96), config=config, progress=False)
    reward.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another \['preprocess'\]; give the tower"):
        DistilledReward.from_pretrained(tmp_path)
    with torch.no_grad():
        again = DistilledReward.from_pretrained(tmp_path, squashing)
        assert torch.equal(again(images(4)), reward(images(4)))


def test_a_write_that_fails_leaves_the_old_folder(reward, tmp_path, monkeypatch):
    reward.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    other = copy.deepcopy(reward)
    with torch.no_grad():
        other.head.layers[0].weight.mul_(2)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("stitchvm_ext.rewards.distilled.json.dumps", lambda *args, **options: 1 / 0)
        other.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    DistilledReward.from_pretrained(tmp_path)


@torch.no_grad()
def test_cut_and_description(reward):
    expected = reward(images(3))
    for layer, tokens in reward.entering_tokens(images(3), [1, 2, 4]).items():
        rebuilt = reward_suffix_from_description(json.loads(json.dumps(reward.describe())), layer)
        rebuilt.load_state_dict({name: reward.state_dict()[name] for name in rebuilt.state_dict()})
        for suffix in (reward.suffix(layer), rebuilt):
            assert not any(p.requires_grad for p in suffix.head_parameters())
            assert all(p.requires_grad for p in suffix.tower.parameters())
            torch.testing.assert_close(
                suffix.score(suffix.forward_from(tokens, layer), None), expected, rtol=1e-5, atol=1e-3
            )


def test_shares_its_tower_in_a_sum(reward, student):
    assert RewardSum([(student, 1.0), (reward, 1.0)], normalise=[(0, 1), (0, 1)]).towers == [0, 0]


def test_three_steps_of_stitching(reward, tmp_path):
    pipe = tiny.tiny_pipeline()
    value = stitch(
        pipe, reward, images(32), depth=2, layer=1, work_dir=tmp_path / "work", probe_images=8,
        config=FinetuneConfig(epochs=1, batch_size=8), text_options={"max_sequence_length": 0}, progress=False,
    )  # fmt: skip
    assert value.details["training steps"] == 3
    value.save_pretrained(tmp_path / "value")
    again = StitchedValue.from_pretrained(tmp_path / "value", pipe)
    encoding = backbone_of(pipe).encode_text(pipe, PROMPTS, max_sequence_length=0)
    condition, z = Condition(tuple(PROMPTS), encoding), torch.randn(2, 4, 16, 16)
    before, after = (v.value_and_grad(z, 0.5, condition) for v in (value, again))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert before[1].abs().amax() > 0


@pytest.mark.parametrize(
    ("score_fn", "error", "message"),
    [
        (lambda x, p: x[:, 0].mean((1, 2))[:, None], ValueError, "32 scores, one per image, got shape"),
        (lambda x, p: x[:, 0].mean((1, 2)).log() * float("inf"), ValueError, "finite scores, got -inf for image 0"),
        (lambda x, p: torch.ones(len(x)), ValueError, "scores that differ, got 1"),
    ],
)
def test_bad_black_boxes(student, score_fn, error, message):
    with pytest.raises(error, match=message):
        distil_reward(score_fn, student, images(96), config=CONFIG, progress=False)


def test_bad_arguments(student, reward):
    with pytest.raises(ValueError, match="at least 8 to train on and to hold out"):
        distil_reward(redness, student, images(40), config=CONFIG, progress=False)
    with pytest.raises(ValueError, match="prompts: expected 96"):
        distil_reward(redness, student, images(96), PROMPTS, config=CONFIG, progress=False)
    with pytest.raises(ValueError, match="with text embeddings"):
        distil_reward(redness, reward, images(96), PROMPTS * 48, config=CONFIG, progress=False)
    with pytest.raises(TypeError, match="student"):
        distil_reward(redness, torch.nn.Identity(), images(96), config=CONFIG, progress=False)
    with pytest.raises(ValueError, match="held_out"):
        DistilConfig(held_out=1.0)
    in_memory = distil_reward(redness, tiny.tiny_reward(), images(96), config=DistilConfig(epochs=1), progress=False)
    with pytest.raises(ValueError, match="built in memory"):
        in_memory.save_pretrained("nowhere")
