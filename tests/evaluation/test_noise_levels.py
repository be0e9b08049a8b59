"""Accuracy by noise level on the playground's models, against the same figures worked out at once."""

from __future__ import annotations

import json

import pytest
import torch

from stitchvm_ext import MonteCarloValue, TweedieValue, ValueSum
from stitchvm_ext.backbones import Condition, expand_rows
from stitchvm_ext.evaluation import evaluate_noise_levels, read_evaluation_set, spearman
from stitchvm_ext.evaluation.noise_levels import noise_for
from stitchvm_ext.playground import experiments, load_pipeline, load_reward, load_value
from tests.evaluation import data


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def reward():
    return load_reward("clip")


@pytest.fixture(scope="module")
def value(pipe):
    return load_value(pipe)


def test_retrieval(pipe, reward, value, tmp_path):
    found = read_evaluation_set("coco", *data.write_coco(tmp_path, 24))
    estimators = {"stitched": value, "Tweedie": TweedieValue(pipe, reward)}
    report = evaluate_noise_levels(
        pipe, estimators, found, reward=reward, sigmas=(0.1, 0.95), batch_size=10, progress=False
    )
    assert report.size == (64, 64) and report.images == 24 and report.clean > 0.8
    for rows in report.curves.values():
        near, far = rows
        assert near["R@1"] > 0.7 and near["Spearman with the clean reward"] > 0.8
        assert far["R@1"] < near["R@1"] - 0.3
        assert far["Spearman with the clean reward"] < near["Spearman with the clean reward"]
    again = evaluate_noise_levels(pipe, {"stitched": value}, found, sigmas=(0.1,), batch_size=7, progress=False)
    assert again.clean is None
    assert again.curves["stitched"] == [{"sigma": 0.1, "R@1": report.curves["stitched"][0]["R@1"]}]


def test_preference(pipe, reward, value, tmp_path):
    found = read_evaluation_set("hpdv2", *data.write_hpdv2(tmp_path, 4, 3))
    report = evaluate_noise_levels(pipe, {"v": value}, found, reward=reward, sigmas=(0.25,), progress=False)
    (row,) = report.curves["v"]

    images = experiments.picture_tensor([p for g in range(4) for p in data.pictures(3, 20 + g)]).float() / 255
    with torch.no_grad():
        latents = value.backbone.encode_images(pipe.vae, images)
        noisy = 0.75 * latents + 0.25 * noise_for(latents, 0, 0)
        condition = Condition(tuple(found.prompts), expand_rows(value.null_condition, 12))
        scores, clean = value.value(noisy, 0.25, condition), reward(images, found.prompts)
    assert row["preference accuracy"] == pytest.approx(found.measure(scores))
    assert row["Spearman with the clean reward"] == pytest.approx(spearman(scores, clean))
    assert report.clean == pytest.approx(found.measure(clean))


def test_ratings(pipe, tmp_path):
    found = read_evaluation_set("ava", *data.write_ava(tmp_path))
    tweedie = TweedieValue(pipe, load_reward("aesthetic"))
    report = evaluate_noise_levels(
        pipe, {"a": tweedie, "2a": ValueSum([(tweedie, 2.0)])}, found, sigmas=(0.5,), batch_size=3, progress=False
    )
    (row,), (doubled,) = report.curves.values()
    assert set(row) == {"sigma", "Spearman with people's ratings"} and -1 <= row["Spearman with people's ratings"] <= 1
    assert doubled == row


def test_noise_is_each_pictures_own():
    latents = torch.zeros(3, 4, 2, 2)
    assert torch.equal(noise_for(latents, 5, 1)[1:], noise_for(latents[1:], 6, 1))
    assert not torch.equal(noise_for(latents, 0, 1), noise_for(latents, 0, 2))


def test_bad_arguments(pipe, reward, value, tmp_path):
    coco = read_evaluation_set("coco", *data.write_coco(tmp_path / "coco", 4))
    ava = read_evaluation_set("ava", *data.write_ava(tmp_path / "ava"))

    def run(found=coco, estimators=None, **options):
        evaluate_noise_levels(pipe, estimators or {"v": value}, found, progress=False, **options)

    with pytest.raises(ValueError, match="sigmas: expected noise levels between 0 and 1"):
        run(sigmas=(0.5, 1.0))
    with pytest.raises(ValueError, match="data: expected at least 2 pictures, got 1"):
        run(coco.head(1))
    with pytest.raises(ValueError, match="made for latents of"):
        run(size=(128, 128))
    with pytest.raises(ValueError, match="OpenClipReward scores for prompts, and AVA has none"):
        run(ava)
    with pytest.raises(ValueError, match="asks for text embeddings, of a CLIP-like reward, got AestheticReward"):
        run(reward=load_reward("aesthetic"))
    with pytest.raises(TypeError, match="of a StitchedValue or TweedieValue, got MonteCarloValue"):
        run(estimators={"m": MonteCarloValue(pipe, reward, 1)})


def test_report(pipe, reward, value, tmp_path):
    found = read_evaluation_set("hpdv2", *data.write_hpdv2(tmp_path))
    report = evaluate_noise_levels(pipe, {"mine": value}, found, reward=reward, sigmas=(0.1, 0.5), progress=False)
    table = report.table()
    assert "HPDv2, 6 images of 64 x 64 pixels" in table and "the clean reward's own preference accuracy is" in table
    assert len([line for line in table.splitlines() if line.strip().startswith("0.")]) == 2
    report.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text())["curves"] == report.curves
    assert (tmp_path / "out" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["accuracy.json", "accuracy.png"]
    entry = report.card_entry("mine")
    assert entry["rows"] == report.curves["mine"] and entry["clean"] == report.clean and entry["images"] == 6
