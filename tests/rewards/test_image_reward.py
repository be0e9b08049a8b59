"""ImageReward against a forward pass written out in the checkpoint's own names, on a small random checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stitchvm_ext import StitchedValue, stitch
from stitchvm_ext.rewards import ImageReward, reward_suffix_from_description
from stitchvm_ext.rewards.image_reward import SCORE_MEAN, SCORE_STD, fold_affine
from stitchvm_ext.value import FinetuneConfig
from tests import tiny
from tests.tiny.image_reward import DEPTH, HEAD, PATCH, TEXT_DEPTH, WIDTH, WORDS, tiny_imagereward

from . import contract

PROMPTS = ["a red circle", "two green triangles", " ".join(["a small blue square and"] * 9)]  # the last is cut


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_imagereward(tmp_path_factory.mktemp("weights") / "imagereward")


@pytest.fixture(scope="module")
def reward(folder):
    return ImageReward.from_pretrained(folder)


def images(count: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(5))


def attend(q, k, v, heads, mask=None):
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    logits = split(q) @ split(k).transpose(-1, -2) / (q.shape[-1] // heads) ** 0.5
    weights = (logits if mask is None else logits.masked_fill(~mask[:, None, None].bool(), -torch.inf)).softmax(-1)
    return (weights @ split(v)).transpose(1, 2).flatten(2)


def reference_tokens(state, pixels):
    """BLIP's image tower, in timm's layout."""
    get = lambda name: state[f"blip.visual_encoder.{name}"]  # noqa: E731
    linear = lambda x, name: F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, (WIDTH,), get(f"{name}.weight"), get(f"{name}.bias"), 1e-6)  # noqa: E731
    x = F.conv2d(pixels, get("patch_embed.proj.weight"), get("patch_embed.proj.bias"), stride=PATCH)
    x = torch.cat([get("cls_token").expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + get("pos_embed")
    for n in range(DEPTH):
        q, k, v = linear(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v, WIDTH // 64), f"blocks.{n}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1")), f"blocks.{n}.mlp.fc2")
    return norm(x, "norm")


def reference_score(state, tokens, prompt):
    """One image and one prompt: BLIP's text encoder, the head layer by layer, the authors' normalisation."""
    get = lambda name: state[f"blip.text_encoder.{name}"]  # noqa: E731
    linear = lambda x, name: F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))  # noqa: E731

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), 1e-12)

    def attention(x, name, memory, mask=None):
        q, k, v = (linear(y, f"{name}.self.{p}") for y, p in ((x, "query"), (memory, "key"), (memory, "value")))
        out = linear(attend(q, k, v, 4, mask), f"{name}.output.dense")
        return norm(out + x, f"{name}.output.LayerNorm")

    ids = [WORDS.index("[CLS]"), *(WORDS.index(word) for word in prompt.split())][:34] + [WORDS.index("[SEP]")]
    mask = torch.tensor([[1] * len(ids) + [0] * (35 - len(ids))])
    ids = torch.tensor([ids + [0] * (35 - len(ids))])
    x = get("embeddings.word_embeddings.weight")[ids] + get("embeddings.position_embeddings.weight")[:35]
    x = norm(x, "embeddings.LayerNorm")
    for n in range(TEXT_DEPTH):
        layer = f"encoder.layer.{n}"
        x = attention(x, f"{layer}.attention", x, mask)
        x = attention(x, f"{layer}.crossattention", tokens)
        inner = linear(F.gelu(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        x = norm(inner + x, f"{layer}.output.LayerNorm")
    r = x[:, 0]
    for number in HEAD:
        r = F.linear(r, state[f"mlp.layers.{number}.weight"], state[f"mlp.layers.{number}.bias"])
    return (r[0, 0] - SCORE_MEAN) / SCORE_STD


@torch.no_grad()
def test_tokens_and_scores_equal_the_original_layout(folder, reward):
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    tokens = reference_tokens(state, reward.preprocess(images()))
    output = reward.output(images())
    torch.testing.assert_close(output.tokens, tokens, rtol=0, atol=1e-5)
    assert torch.equal(output.embedding, output.tokens[:, 0])
    expected = torch.stack([reference_score(state, t[None], p) for t, p in zip(tokens, PROMPTS, strict=True)])
    assert expected.std() > 0.05  # the cases differ by far more than the tolerance
    torch.testing.assert_close(reward(images(), PROMPTS), expected, rtol=0, atol=1e-5)
    assert reward(images(), PROMPTS).dtype == torch.float32


def test_contract(folder, reward):
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    x = contract.images()
    tokens = reference_tokens(state, reward.preprocess(x))
    expected = [reference_score(state, t[None], p) for t, p in zip(tokens, contract.PROMPTS, strict=True)]
    contract.assert_contract(reward, x, torch.stack(expected))


def test_folded_head_equals_the_layers():
    layers = [(torch.randn(out, width), torch.randn(out)) for out, width in HEAD.values()]
    x = expected = torch.randn(5, 32, dtype=torch.float64)
    for weight, bias in layers:
        expected = F.linear(expected, weight.double(), bias.double())
    torch.testing.assert_close(F.linear(x, *fold_affine(layers)), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_every_image_meets_its_own_prompt_in_one_pass(reward):
    calls = []
    handle = reward.scorer.model.register_forward_hook(
        lambda m, a, kw, out: calls.append(len(kw["input_ids"])), with_kwargs=True
    )
    together = reward(images(), PROMPTS)
    handle.remove()
    assert calls == [3]
    alone = torch.cat([reward(images()[k : k + 1], PROMPTS[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    other = reward(images(), PROMPTS[::-1])
    assert (other - together)[[0, 2]].abs().min() > 1e-3


@torch.no_grad()
def test_cut_at_every_layer(reward):
    expected = reward(images(), PROMPTS)
    condition = reward.encode_condition(PROMPTS)
    for layer, tokens in reward.entering_tokens(images(), [1, 2, 3]).items():
        suffix = reward.suffix(layer)
        assert all(p.requires_grad for p in suffix.parameters())
        assert len(suffix.state_dict()) < len(reward.state_dict())
        for model in (reward, suffix):
            torch.testing.assert_close(model.score(model.forward_from(tokens, layer), condition), expected)


@torch.no_grad()
def test_preprocessing_is_the_references(reward):
    from torchvision import transforms

    reference = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    picture = (images(1, 60, 81)[0] * 255).byte()
    expected = reference(Image.fromarray(picture.permute(1, 2, 0).numpy().astype(np.uint8)))
    got = reward.preprocess(picture[None] / 255)[0]
    assert (got - expected).abs().max() < 2.5 / 255 / 0.26  # PIL rounds to 8 bits after each axis


def test_gradient_reaches_the_images_and_nothing_else(reward):
    x = images().requires_grad_()
    reward(x, PROMPTS).sum().backward()
    assert x.grad.isfinite().all() and x.grad.flatten(1).abs().amax(1).min() > 0
    assert not any(p.grad is not None for p in (*reward.parameters(), *reward.scorer.model.parameters()))


def test_gradient_against_finite_differences(folder):
    reward = ImageReward.from_pretrained(folder).double()
    tokens = torch.randn(1, 17, WIDTH, dtype=torch.float64, requires_grad=True)
    words = reward.encode_condition(PROMPTS[:1])
    run = lambda t: reward.score(reward.forward_from(t, 2), words).double()  # noqa: E731
    (grad,) = torch.autograd.grad(run(tokens).sum(), tokens)
    direction = torch.randn_like(tokens)
    with torch.no_grad():
        slope = (run(tokens + 1e-3 * direction) - run(tokens - 1e-3 * direction)) / 2e-3
    torch.testing.assert_close(slope[0], (grad * direction).sum(), rtol=1e-2, atol=1e-4)


def test_suffix_finds_its_text_encoder_again_by_the_reference(reward):
    description = json.loads(json.dumps(reward.describe()))
    suffix = reward_suffix_from_description(description, 2)
    suffix.load_state_dict({name: reward.state_dict()[name] for name in suffix.state_dict()})
    assert suffix.scorer.model is None and not any("text" in name for name in suffix.state_dict())
    with torch.no_grad():
        tokens = reward.entering_tokens(images(), [2])[2]
        score = suffix.score(suffix.forward_from(tokens, 2), suffix.encode_condition(PROMPTS))
        torch.testing.assert_close(score, reward(images(), PROMPTS))


def test_stitched_value_folder(folder, reward, tmp_path):
    pipe = tiny.tiny_pipeline()
    value = stitch(
        pipe, reward, images(24), depth=2, layer=1, work_dir=tmp_path / "work", probe_images=8,
        config=FinetuneConfig(epochs=1, batch_size=8), text_options={"max_sequence_length": 0}, progress=False,
    )  # fmt: skip
    value.save_pretrained(tmp_path / "value")
    again = StitchedValue.from_pretrained(tmp_path / "value", pipe)
    from stitchvm_ext.backbones import Condition

    encoding = value.backbone.encode_text(pipe, PROMPTS[:2], max_sequence_length=0)
    condition, z = Condition(tuple(PROMPTS[:2]), encoding), torch.randn(2, 4, 16, 16)
    before, after = (v.value_and_grad(z, 0.5, condition) for v in (value, again))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert before[1].flatten(1).abs().amax(1).min() > 0


def edited(folder, target, edit):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    state = torch.load(target / "ImageReward.pt", weights_only=True)
    edit(state)
    torch.save(state, target / "ImageReward.pt")
    return target


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s.pop("blip.visual_encoder.blocks.1.attn.qkv.bias"),
            r"missing \['blip.visual_encoder.blocks.1.attn",
        ),
        (lambda s: s.pop("blip.visual_encoder.cls_token"), "cls_token"),
        (lambda s: s.update({"blip.itm_head.weight": torch.zeros(2, 2)}), r"unknown \['blip.itm_head.weight'\]"),
        (lambda s: s.update({"mlp.layers.7.weight": torch.zeros(1, 9)}), "shapes"),
        (lambda s: s.update({"epoch": 3}), "dict of tensors"),
    ],
)
def test_other_checkpoints_are_refused(folder, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        ImageReward.from_pretrained(edited(folder, tmp_path / "other", edit))


def test_files_and_tokenizer(folder, reward, tmp_path):
    with pytest.raises(OSError, match="expected ImageReward.pt and med_config.json"):
        ImageReward.from_pretrained(tmp_path)
    bare = edited(folder, tmp_path / "bare", lambda s: None)
    (bare / "vocab.txt").rename(tmp_path / "vocab.txt")
    with pytest.raises(OSError, match="vocab.txt"):
        ImageReward.from_pretrained(bare)
    for source in (tmp_path, tmp_path / "vocab.txt"):
        assert torch.equal(ImageReward.from_pretrained(bare, source)(images(), PROMPTS), reward(images(), PROMPTS))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]))
    with pytest.raises(ValueError, match=f"expected {len(WORDS)} entries .* got {len(WORDS) - 1}"):
        ImageReward.from_pretrained(bare, tmp_path)


def test_prompts_are_needed(reward):
    with pytest.raises(ValueError, match="one prompt each, got None"):
        reward(images())
    with pytest.raises(TypeError, match="list of strings"):
        reward.encode_condition("a red circle")
    with pytest.raises(ValueError, match="expected 3 prompts, got 2"):
        reward.score(reward.output(images()), reward.encode_condition(PROMPTS[:2]))
