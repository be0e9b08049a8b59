"""OpenClipReward and AestheticReward against open_clip itself, on small random towers in open_clip's formats."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from stitchvm_ext import playground
from stitchvm_ext.playground import models, train
from stitchvm_ext.rewards import AestheticReward, OpenClipReward, reward_suffix_from_description
from stitchvm_ext.rewards import text as text_side
from stitchvm_ext.rewards.scalar_head import ScalarHead

open_clip = pytest.importorskip("open_clip")

PROMPTS = ["a red circle", "two green triangles", "a small blue square and a yellow ring"]
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 8}
TEXT = {"context_length": models.MAX_TOKENS, "vocab_size": len(models.WORDS), "width": 32, "heads": 4, "layers": 2}


def tiny_config(quick_gelu: bool = False, **vision) -> dict:
    return {"embed_dim": 24, "vision_cfg": {**VISION, **vision}, "text_cfg": TEXT, "quick_gelu": quick_gelu}


def tiny_reward(seed: int = 0, reference=None, **config) -> tuple[OpenClipReward, nn.Module]:
    """A reward and the open_clip model in it."""
    torch.manual_seed(seed)
    config = tiny_config(**config)
    clip = open_clip.CLIP(**copy.deepcopy(config)).eval()
    tokenizer = models.build_tokenizer()
    return OpenClipReward(clip, lambda texts: models.tokenize(tokenizer, texts), config, reference), clip


def tiny_aesthetic() -> AestheticReward:
    torch.manual_seed(1)
    config = tiny_config()
    head = ScalarHead({0: (16, 24), 2: (1, 16)}, "gelu")
    return AestheticReward(open_clip.CLIP(**copy.deepcopy(config)), None, config, head)


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in open_clip's format, as the playground's weights are packed; weights random."""
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("weights") / "reward"
    clip = open_clip.CLIP(**copy.deepcopy(models.CLIP_CONFIG))
    train.save_reward(clip, models.build_aesthetic_head(), path)
    return path


def edited_copy(folder, target, **model_cfg):
    """The folder's copy under another name, with changes to its model configuration."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "open_clip_config.json").read_text())
    config["model_cfg"].update(model_cfg)
    (target / "open_clip_config.json").write_text(json.dumps(config))
    return target


def assert_rounded(got, expected):
    """Equal up to the rounding of the fused blocks, which sum in another order than open_clip's."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


TOWERS = {
    "class token": {},
    "QuickGELU": {"quick_gelu": True},
    "average pooling": {"pool_type": "avg"},
    "norm after pooling": {"final_ln_after_pool": True},
    "attention pooling": {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 8},
    "no norm before the blocks": {"no_ln_pre": True},
    "layer scale": {"ls_init_value": 0.1},
}


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_cut_at_every_layer_equals_encode_image(tower):
    reward, clip = tiny_reward(**TOWERS[tower])
    expected = clip.encode_image(reward.preprocess(images()))
    entering = reward.entering_tokens(images(), [1, 2, 3, 4])
    assert_rounded(reward.output(images()).embedding, expected)
    for layer, tokens in entering.items():
        assert_rounded(reward.forward_from(tokens, layer).embedding, expected)
    for layer in range(1, 5):
        suffix = reward.suffix(layer).requires_grad_(False)
        assert_rounded(suffix.forward_from(entering[layer], layer).embedding, expected)


@pytest.mark.parametrize("tower", ["class token", "average pooling"])
@torch.no_grad()
def test_output_tokens_are_the_towers_own(tower):
    reward, clip = tiny_reward(**TOWERS[tower])
    clip.visual.output_tokens = True
    _, tokens = clip.visual(reward.preprocess(images()))
    assert_rounded(reward.output(images()).tokens[:, 1:], tokens)
    assert reward.output(images()).tokens.shape == (3, 1 + 16, 32)


@torch.no_grad()
def test_score_is_the_cosine_and_texts_are_encoded_by_the_text_tower():
    reward, clip = tiny_reward()
    ids = models.tokenize(models.build_tokenizer(), PROMPTS)
    text = clip.encode_text(ids, normalize=True)
    image = clip.encode_image(reward.preprocess(images()), normalize=True)
    torch.testing.assert_close(reward.encode_condition(PROMPTS), text, atol=1e-6, rtol=0)
    torch.testing.assert_close(reward(images(), PROMPTS), (image * text).sum(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(reward.encode_condition(7 * text), text, atol=1e-6, rtol=0)
    assert reward(images(), PROMPTS).dtype == torch.float32


def test_rewards_are_frozen_and_differentiable_in_the_image():
    for reward in (tiny_reward()[0], tiny_aesthetic()):
        assert not reward.training and not any(p.requires_grad for p in reward.parameters())
        x = images().requires_grad_()
        reward(x, PROMPTS).sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().amax() > 0


def test_bfloat16():
    reward, _ = tiny_reward()
    expected = reward(images(), PROMPTS)
    assert (reward.bfloat16()(images(), PROMPTS) - expected).abs().max() < 0.03
    assert reward(images(), PROMPTS).dtype == torch.float32


def test_text_cache_is_bounded_and_gives_the_same_rows(monkeypatch):
    monkeypatch.setattr(text_side, "CACHED_PROMPTS", 2)
    reward, clip = tiny_reward()
    first = reward.encode_condition(PROMPTS)
    assert list(reward.text.cache) == PROMPTS[1:]
    reward.text.tower = None  # the tower is not asked again for what is cached
    assert torch.equal(reward.encode_condition([PROMPTS[2], PROMPTS[1], PROMPTS[2]]), first[[2, 1, 2]])


def test_text_embeddings_made_under_inference_mode_can_be_differentiated_against():
    reward, _ = tiny_reward()
    with torch.inference_mode():
        reward.encode_condition(PROMPTS)
    pixels = images().requires_grad_()
    reward(pixels, PROMPTS).sum().backward()
    assert pixels.grad.isfinite().all() and (pixels.grad.flatten(1).norm(dim=1) > 0).all()


# --------------------------------------------------------------------------------------------------------------- suffix


@pytest.mark.parametrize("make", [lambda: tiny_reward()[0], tiny_aesthetic], ids=["clip", "aesthetic"])
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_suffix_round_trip(make, layer):
    reward = make()
    suffix = reward.suffix(layer)
    description = json.loads(json.dumps(reward.describe()))
    rebuilt = reward_suffix_from_description(description, layer)
    rebuilt.load_state_dict(suffix.state_dict())
    assert type(rebuilt) is type(reward) and rebuilt.describe() == reward.describe()
    tokens = reward.entering_tokens(images(), [layer])[layer]
    with torch.no_grad():
        for module in (suffix, rebuilt):
            output = module.requires_grad_(False).forward_from(tokens, layer)
            assert_rounded(module.score(output, reward.encode_condition(PROMPTS)), reward(images(), PROMPTS))
    kept = set(suffix.state_dict())
    assert kept < set(reward.state_dict())
    assert {int(k.split(".")[3]) for k in kept if "resblocks" in k} == set(range(layer - 1, 4))
    assert not any("conv1" in k or "token_embedding" in k for k in kept)
    assert ("visual.class_embedding" in kept) == (layer == 1)


def test_suffix_is_a_trainable_copy_whose_head_stays_frozen():
    reward = tiny_aesthetic()
    before = {name: t.clone() for name, t in reward.state_dict().items()}
    suffix = reward.suffix(2)
    trainable = [p for p in suffix.parameters() if p.requires_grad]
    heads = {id(p) for p in suffix.head_parameters()}
    assert len(heads) == 4 and len(trainable) == len(list(suffix.parameters())) - 4
    assert not any(id(p) in heads for p in trainable)
    suffix.forward_from(torch.randn(2, 17, 32), 2).embedding.sum().backward()
    with torch.no_grad():
        for p in trainable:
            p.add_(1.0)
    assert all(torch.equal(t, before[name]) for name, t in reward.state_dict().items())
    assert not any(p.requires_grad for p in reward.parameters())


def test_suffix_scores_prompts_with_the_original_text_tower(folder):
    reward = OpenClipReward.from_pretrained(folder)
    in_memory = reward.suffix(2)
    from_disk = reward_suffix_from_description(json.loads(json.dumps(reward.describe())), 2)
    assert torch.equal(in_memory.encode_condition(PROMPTS), reward.encode_condition(PROMPTS))
    assert from_disk.text.tower is None
    assert torch.equal(from_disk.encode_condition(PROMPTS), reward.encode_condition(PROMPTS))


def test_reference_to_the_playground_survives_a_move(folder, tmp_path, monkeypatch):
    moved = edited_copy(folder, tmp_path / "reward")
    description = OpenClipReward.from_pretrained(folder).describe()
    description["reference"] = {"name": "playground:reward", "pretrained": None}
    monkeypatch.setattr(playground, "weights_dir", lambda: tmp_path)
    suffix = reward_suffix_from_description(description, 1)
    assert suffix.encode_condition(PROMPTS).shape == (3, 128)
    assert OpenClipReward.from_pretrained("playground:reward").describe()["reference"]["name"] == "playground:reward"
    (moved / "open_clip_model.safetensors").unlink()
    with pytest.raises(OSError, match="reward folder .*open_clip_model.safetensors"):
        reward_suffix_from_description(description, 1).encode_condition(PROMPTS)


def test_suffix_without_reference_takes_embeddings_only():
    reward, _ = tiny_reward()
    suffix = reward_suffix_from_description(reward.describe(), 1)
    with pytest.raises(ValueError, match="prompts: .*text embeddings"):
        suffix.encode_condition(PROMPTS)
    assert suffix.encode_condition(torch.randn(2, 24)).norm(dim=-1).allclose(torch.ones(2))


# -------------------------------------------------------------------------------------------------------------- loading


@torch.no_grad()
def test_folder_loads_as_open_clip_loads_it(folder, tmp_path):
    clip = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    for name in (folder, str(folder), f"local-dir:{folder}"):
        reward = OpenClipReward.from_pretrained(name, licence="Apache-2.0")
        x = images(size=64)
        assert_rounded(reward.output(x).embedding, clip.encode_image(reward.preprocess(x)))
        text = clip.encode_text(tokenizer(PROMPTS), normalize=True)
        torch.testing.assert_close(reward.encode_condition(PROMPTS), text, atol=1e-6, rtol=0)
        assert reward.describe()["licence"] == "Apache-2.0"
    pickled = edited_copy(folder, tmp_path / "pickled")
    (pickled / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": clip.state_dict()}, pickled / "open_clip_pytorch_model.bin")
    assert torch.equal(OpenClipReward.from_pretrained(pickled).output(x).embedding, reward.output(x).embedding)


def test_built_in_model_with_a_weights_file(folder, tmp_path, monkeypatch):
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"].pop("hf_tokenizer_name")
    (tmp_path / "tiny-shapes.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(tmp_path)
    reward = OpenClipReward.from_pretrained("tiny-shapes", str(folder / "open_clip_model.safetensors"))
    expected = OpenClipReward.from_pretrained(folder)
    assert torch.equal(reward.output(images(size=64)).embedding, expected.output(images(size=64)).embedding)


def test_laion_heads(folder, tmp_path):
    """The LAION file numbers linear layers and dropouts; with no activation the head is one affine map."""
    torch.manual_seed(3)
    sizes = {0: (20, 128), 2: (16, 20), 4: (8, 16), 6: (4, 8), 7: (1, 4)}
    state = {}
    for index, (out, into) in sizes.items():
        state[f"layers.{index}.weight"], state[f"layers.{index}.bias"] = torch.randn(out, into), torch.randn(out)
    torch.save(state, tmp_path / "linear.pth")
    reward = AestheticReward.from_pretrained(folder, head=tmp_path / "linear.pth")
    e = reward.output(images()).normalized
    for index in sizes:
        e = e @ state[f"layers.{index}.weight"].T + state[f"layers.{index}.bias"]
    torch.testing.assert_close(reward(images()), e.squeeze(-1), rtol=1e-4, atol=1e-4)

    reluful = ScalarHead({0: (5, 6), 3: (4, 5), 6: (1, 4)}, "relu")
    reference = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    reference.load_state_dict(dict(zip(reference.state_dict(), reluful.state_dict().values(), strict=True)))
    x = torch.randn(7, 6)
    assert torch.equal(reluful(x), reference(x).squeeze(-1))


def test_aesthetic_head_of_the_playground_keeps_its_activation(folder):
    reward = AestheticReward.from_pretrained(folder)
    assert reward.head.activation == "gelu" and reward.distillation == "score"
    head = models.build_aesthetic_head()
    head.load_state_dict(reward.head.state_dict())
    assert_rounded(reward(images()), head(reward.output(images()).normalized))
    assert torch.equal(reward(images(), PROMPTS), reward(images()))


# ---------------------------------------------------------------------------------------------------------- bad input


def test_quick_gelu_mismatch_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: pytest.fail("weights were asked for"))
    for name, tag in (("ViT-L-14-336", "openai"), ("ViT-H-14-378", "dfn5b"), ("ViT-B/32", "openai")):
        if tag in open_clip.list_pretrained_tags_by_model(name.replace("/", "-")):
            with pytest.raises(ValueError, match="QuickGELU; expected ViT-.*-quickgelu"):
                OpenClipReward.from_pretrained(name, tag)
    assert "openai" in open_clip.list_pretrained_tags_by_model("ViT-L-14-336")


def test_quick_gelu_by_name_warns(folder, tmp_path, recwarn):
    with pytest.warns(UserWarning, match="DFN5B-CLIP.*QuickGELU"):
        OpenClipReward.from_pretrained(edited_copy(folder, tmp_path / "DFN5B-CLIP"))
    recwarn.clear()
    OpenClipReward.from_pretrained(edited_copy(folder, tmp_path / "dfn-good", quick_gelu=True))
    OpenClipReward.from_pretrained(folder)
    assert not [w for w in recwarn if "QuickGELU" in str(w.message)]


def test_loading_errors_name_what_is_wrong(folder, tmp_path):
    with pytest.raises(OSError, match="expected open_clip_config.json"):
        OpenClipReward.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="/no/such/folder"):
        OpenClipReward.from_pretrained("/no/such/folder")
    with pytest.raises(ValueError, match="name: expected .*'ViT-Z'"):
        OpenClipReward.from_pretrained("ViT-Z", "openai")
    with pytest.raises(ValueError, match="pretrained: expected .*'nobody'"):
        OpenClipReward.from_pretrained("ViT-B-32", "nobody")
    with pytest.raises(ValueError, match="pretrained: expected .*None"):
        OpenClipReward.from_pretrained("ViT-B-32")
    corrupt = edited_copy(folder, tmp_path / "corrupt")
    (corrupt / "open_clip_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(OSError, match="corrupt.*cannot be loaded"):
        OpenClipReward.from_pretrained(corrupt)
    other = edited_copy(folder, tmp_path / "other", embed_dim=64)
    with pytest.raises(OSError, match="other.*cannot be loaded"):
        OpenClipReward.from_pretrained(other)


def test_head_errors(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "stitchvm_ext.rewards.open_clip.load_open_clip", lambda *a: pytest.fail("a CLIP was loaded first")
    )
    with pytest.raises(ValueError, match="head: expected the file of the scalar head"):
        AestheticReward.from_pretrained("ViT-B-32", "laion2b_s34b_b79k")
    monkeypatch.undo()
    with pytest.raises(OSError, match="head .*missing.pth"):
        AestheticReward.from_pretrained(folder, head=tmp_path / "missing.pth")
    torch.save({"weight": torch.zeros(1, 128)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected keys layers.N.weight"):
        AestheticReward.from_pretrained(folder, head=tmp_path / "other.pth")
    torch.save({"layers.0.weight": print}, tmp_path / "code.pth")
    with pytest.raises(OSError, match="code.pth: cannot be read"):
        AestheticReward.from_pretrained(folder, head=tmp_path / "code.pth")
    torch.save({"layers.0.weight": torch.zeros(1, 64), "layers.0.bias": torch.zeros(1)}, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="width 128, got 64"):
        AestheticReward.from_pretrained(folder, head=tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="activation: expected one of .*'tanh'"):
        ScalarHead({0: (1, 4)}, "tanh")


def test_call_errors():
    reward, _ = tiny_reward()
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, H, W\], got \[3, 32, 32\]"):
        reward(images()[0], PROMPTS)
    with pytest.raises(TypeError, match="images: expected floating point"):
        reward((images() * 255).byte(), PROMPTS)
    with pytest.raises(ValueError, match="prompts: expected 3, one per image, got 2"):
        reward(images(), PROMPTS[:2])
    with pytest.raises(ValueError, match="prompts: .* got None"):
        reward(images())
    with pytest.raises(TypeError, match="prompts: expected a list of strings"):
        reward.encode_condition("a red circle")
    with pytest.raises(ValueError, match=r"text embeddings \[B, 24\], got shape \[2, 25\]"):
        reward.encode_condition(torch.randn(2, 25))
    with pytest.raises(ValueError, match=r"condition: expected text embeddings \[3, 24\], got \[2, 24\]"):
        reward.score(reward.output(images()), torch.randn(2, 24))
    for layer in (0, 5):
        with pytest.raises(ValueError, match=rf"layer \(j\): expected a reward block in 1..4, got {layer}"):
            reward.suffix(layer)
    suffix = reward.suffix(3)
    with pytest.raises(ValueError, match=r"layer \(j\): expected a reward block in 3..4, got 2"):
        suffix.forward_from(torch.randn(1, 17, 32), 2)
    with pytest.raises(ValueError, match="images: expected the whole reward"):
        suffix(images(), PROMPTS)
    with pytest.raises(ValueError, match=r"description\['class'\]: expected one of .*'Other'"):
        reward_suffix_from_description({"class": "Other"}, 1)


def test_other_image_towers_are_refused():
    config = tiny_config()
    config["vision_cfg"] = {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1]}
    with pytest.raises(TypeError, match="VisionTransformer, got ModifiedResNet"):
        OpenClipReward(open_clip.CLIP(**copy.deepcopy(config)), None, config)
