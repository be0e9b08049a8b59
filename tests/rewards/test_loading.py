"""load_reward, and the heads of LAION's predictors."""

from __future__ import annotations

import pytest
import torch

import stitchvm_ext
from stitchvm_ext import load_reward
from stitchvm_ext.rewards import KINDS, REGISTRY, AestheticReward, HFClipReward, OpenClipReward
from stitchvm_ext.rewards.scalar_head import ScalarHead

from ..tiny import rewards as tiny
from .contract import PROMPTS, assert_contract, images

pytest.importorskip("open_clip")


@pytest.mark.parametrize("kind", tiny.REWARDS)
def test_every_kind_loads_from_its_format_and_gives_scores(kind, tmp_path):
    reward = tiny.REWARDS[kind](tmp_path)
    assert REGISTRY[type(reward).__name__] is type(reward)
    assert reward.image_size == (32, 32) and reward.num_layers == 3
    assert reward.width == (128 if kind == "imagereward" else 32)
    score = reward(images(), PROMPTS)
    assert score.shape == (3,) and score.isfinite().all() and score.std() > 0
    assert (reward.licence is not None) == KINDS[kind].fixed or kind == "timm"


def test_every_kind_is_documented():
    assert set(KINDS) >= {*tiny.REWARDS, "playground", "playground-aesthetic"}
    for kind, known in KINDS.items():
        assert f"\n    {kind} " in load_reward.__doc__ or f"\n    {kind}\n" in load_reward.__doc__, kind
        assert known.scale and known.summary and known.typical[0] < known.typical[1]
    assert "load_reward" in stitchvm_ext.__all__


def test_playground():
    reward = load_reward("playground")
    score = reward(torch.rand(2, 3, 64, 64), ["a red circle", "a blue square"])
    assert type(reward) is OpenClipReward and score.abs().max() <= 1 and reward.licence == "Apache-2.0"
    assert type(load_reward("playground-aesthetic")) is AestheticReward


def test_clip_in_either_format(tmp_path):
    tiny.write_open_clip(tmp_path / "open_clip")
    tiny.write_pickscore(tmp_path / "transformers")
    assert type(load_reward("clip", tmp_path / "open_clip")) is OpenClipReward
    reward = load_reward("clip", tmp_path / "transformers")
    assert type(reward) is HFClipReward and reward.settings["score_as"] == "cosine" and reward.licence is None
    logit = load_reward("clip", tmp_path / "transformers", score_as="logit", licence="MIT")
    assert logit.settings["score_as"] == "logit" and logit.licence == "MIT"
    with pytest.raises(ValueError, match="score_as: expected 'cosine'"):
        load_reward("clip", tmp_path / "open_clip", score_as="logit")


def test_defaults_are_the_published_weights(monkeypatch):
    asked = []
    monkeypatch.setattr("stitchvm_ext.rewards.open_clip.load_open_clip", lambda **k: asked.append(k) or 1 / 0)
    for kind in ("clip", "dfn-clip"):
        with pytest.raises(ZeroDivisionError):
            load_reward(kind)
    assert asked == [
        {"name": "ViT-L-14-336-quickgelu", "pretrained": "openai"},
        {"name": "hf-hub:apple/DFN5B-CLIP-ViT-H-14-378", "pretrained": None},
    ]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"kind: expected one of \[.*'clip'.*'yolos'\], got 'vibes'"):
        load_reward("vibes")
    with pytest.raises(ValueError, match="path: expected one for 'hpsv2'"):
        load_reward("hpsv2")
    with pytest.raises(TypeError, match="options of 'dinov2': missing a required argument: 'label'"):
        load_reward("dinov2", tmp_path)
    with pytest.raises(TypeError, match="options of 'siglip': got an unexpected keyword argument 'label'"):
        load_reward("siglip", tmp_path, label=3)


# ---------------------------------------------------------------------------------------------------------------- heads


def layered(state, embedding, relu=False):
    """A LAION head in float64, layer by layer."""
    x = embedding.double()
    keys = [key for key in state if key.endswith("weight")]
    for key in keys:
        x = x @ state[key].double().T + state[key.replace("weight", "bias")].double()
        x = x.relu() if relu and key != keys[-1] else x
    return x.squeeze(-1)


@pytest.mark.parametrize("width", [16, 768])
def test_affine_head_is_folded_exactly(width, tmp_path):
    state = tiny.laion_head(width)
    torch.save(state, tmp_path / "linearMSE.pth")
    head = ScalarHead.from_file(tmp_path / "linearMSE.pth")
    folded = head.folded()
    assert folded.sizes == {0: (1, width)} and len(list(folded.parameters())) == 2
    x = torch.nn.functional.normalize(torch.randn(500, width, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.no_grad():
        error = (folded(x) - layered(state, x)).abs().max() / layered(state, x).abs().max()
        before = (head(x) - layered(state, x)).abs().max() / layered(state, x).abs().max()
    assert error <= 1e-6 and error <= before + 2e-7, (error, before)
    assert torch.equal(head.layers[0].weight, state["layers.0.weight"])  # the layers themselves are left alone


def test_aesthetic_reward_folds_and_keeps_the_head_frozen(tmp_path):
    reward = tiny.tiny_aesthetic(tmp_path)
    state = torch.load(tmp_path / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    with torch.no_grad():
        expected = layered(state, reward.output(images()).normalized).float()
    assert_contract(reward, images(), expected)
    assert reward.head.sizes == {0: (1, 16)} and reward.distillation == "score"
    assert (expected - 5).abs().max() < 2


def test_relu_head_is_known_by_its_numbering(tmp_path):
    tiny.write_open_clip(tmp_path / "clip", quick_gelu=True)
    state = tiny.laion_head(16, relu=True)
    torch.save(state, tmp_path / "ava+logos-l14-reluMSE.pth")
    reward = load_reward("aesthetic", tmp_path / "clip", head=tmp_path / "ava+logos-l14-reluMSE.pth")
    assert reward.head.activation == "relu" and len(reward.head.sizes) == 5
    with torch.no_grad():
        expected = layered(state, reward.output(images()).normalized, relu=True).float()
    assert_contract(reward, images(), expected)
    assert not torch.allclose(expected, layered(state, reward.output(images()).normalized).float(), atol=1e-3)


def test_older_linear_head(tmp_path):
    tiny.write_open_clip(tmp_path / "clip", quick_gelu=True)
    linear = torch.nn.Linear(16, 1)
    torch.save(linear.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    reward = load_reward("aesthetic", tmp_path / "clip", head=tmp_path / "sa_0_4_vit_l_14_linear.pth")
    with torch.no_grad():
        expected = linear(reward.output(images()).normalized).squeeze(-1)
    assert_contract(reward, images(), expected)


def test_heads_saved_on_a_gpu_are_read_without_one(tmp_path):
    """LAION's files say cuda:0 for every storage."""
    import zipfile

    torch.save(tiny.laion_head(16), tmp_path / "cpu.pth")
    with zipfile.ZipFile(tmp_path / "cpu.pth") as source, zipfile.ZipFile(tmp_path / "gpu.pth", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):  # the location is a pickled string, stored once
                assert data.count(b"X\x03\x00\x00\x00cpu") == 1
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(name, data)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "gpu.pth", weights_only=True)
    head, expected = (ScalarHead.from_file(tmp_path / name) for name in ("gpu.pth", "cpu.pth"))
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), expected.parameters(), strict=True))
