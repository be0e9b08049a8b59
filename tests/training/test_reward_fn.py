"""as_reward_fn, and the examples of docs/rl_engines.md in loops that call them as the engines do."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from stitchvm_ext import RewardSum, TweedieValue, as_reward_fn, backbone_of, load_reward
from stitchvm_ext.backbones import Condition
from stitchvm_ext.training import CleanReward
from tests import tiny
from tests.tiny import rewards
from tests.training.build import stitched_value

PROMPTS = ["a red circle", "two blue squares", "a ring"]
GUIDE = Path(__file__).parents[2] / "docs" / "rl_engines.md"


def rand(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def reference(value, latents, sigma):
    return value.value(latents, sigma, Condition(tuple(PROMPTS), {}))


def test_a_clean_reward_of_images_in_every_form(reward):
    bytes_ = (rand(3, 3, 32, 32) * 255).byte()
    expected = reward(bytes_.float() / 255, PROMPTS)
    score = as_reward_fn(reward, batch_size=2)
    forms = (bytes_, bytes_.float() / 255, list(bytes_.float() / 255), [to_pil_image(image) for image in bytes_])
    for images in forms:
        found = score(images, PROMPTS, None)
        assert found.dtype == torch.float32 and found.shape == (3,) and not found.requires_grad
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(score(bytes_, "a ring"), reward(bytes_.float() / 255, ["a ring"] * 3))
    both = as_reward_fn(RewardSum([(reward, 1.0), (tiny.tiny_reward(2), 2.0)]))(bytes_, PROMPTS)
    torch.testing.assert_close(both, expected + 2 * tiny.tiny_reward(2)(bytes_.float() / 255, PROMPTS))


def test_gradients_pass_through(pipe, reward):
    images = rand(3, 3, 32, 32).requires_grad_()
    (grad,) = torch.autograd.grad(as_reward_fn(reward, batch_size=2)(images, PROMPTS).sum(), images)
    (expected,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    torch.testing.assert_close(grad, expected)
    value = stitched_value(pipe, 2)
    latents = rand(3, 16, 16, 16)[:, : backbone_of(pipe).latent_channels].clone().requires_grad_()
    (grad,) = torch.autograd.grad(as_reward_fn(value)(latents, PROMPTS, sigma=0.5).sum(), latents)
    torch.testing.assert_close(grad, value.value_and_grad(latents, 0.5, Condition(tuple(PROMPTS), {}))[1])
    with pytest.raises(ValueError, match="samples: expected images without a gradient"):
        as_reward_fn(value, pipe)(images, PROMPTS)


def test_latents_and_where_their_noise_level_comes_from(pipe, reward):
    value, backbone = stitched_value(pipe, 2), backbone_of(pipe)
    latents = rand(3, backbone.latent_channels, 16, 16)
    levels = [0.2, 0.5, 0.9]
    expected, score = reference(value, latents, torch.tensor(levels)), as_reward_fn(value, pipe, batch_size=2)
    for metadata in ({"sigma": levels}, [{"sigma": s} for s in levels], [json.dumps({"sigma": s}) for s in levels]):
        torch.testing.assert_close(score(latents, PROMPTS, metadata), expected)
    torch.testing.assert_close(score(list(latents), PROMPTS, {"sigma": 0.7}, sigma=levels), expected)
    fixed = as_reward_fn(value, sigma=0.5)
    torch.testing.assert_close(fixed(latents, PROMPTS, [{"id": 4}, "no JSON", None]), reference(value, latents, 0.5))
    # Images through the autoencoder, and a clean reward of latents through its decoder.
    images = rand(3, 3, 32, 32)
    encoded = backbone.encode_images(pipe.vae, images)
    torch.testing.assert_close(score(images, PROMPTS), reference(value, encoded, 0.0))
    clean = reference(CleanReward(pipe, reward), latents, 0.0)
    torch.testing.assert_close(as_reward_fn(reward, pipe)(latents, PROMPTS, {"sigma": 0}), clean)
    # An estimator that reads prompts gets them encoded.
    tweedie = TweedieValue(pipe, reward)
    found = as_reward_fn(tweedie, pipe, max_sequence_length=0)(latents, PROMPTS, sigma=0.5)
    encoding = backbone.encode_text(pipe, PROMPTS, max_sequence_length=0)
    expected = tweedie.value(latents, 0.5, Condition(tuple(PROMPTS), encoding))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_bad_input(pipe, reward):
    value, images = stitched_value(pipe, 2), rand(3, 3, 32, 32)
    latents = rand(3, backbone_of(pipe).latent_channels, 16, 16)
    for arguments, options, message in (
        ((lambda images: 0,), {}, "scorer: expected a ValueEstimator"),
        ((reward,), {"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ((reward,), {"sigma": 2}, r"sigma: expected a number in \[0, 1\], got 2"),
        ((TweedieValue(pipe, reward),), {}, "pipe: expected a pipeline, as TweedieValue reads encoded prompts"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            as_reward_fn(*arguments, **options)
    for score, samples, arguments, options, message in (
        (as_reward_fn(reward), images, (PROMPTS[:2],), {}, "prompts: expected 3, one per sample, got 2"),
        (as_reward_fn(reward), images * 2, (PROMPTS,), {}, r"images: expected floats in \[0, 1\]"),
        (as_reward_fn(reward), latents, (PROMPTS,), {"sigma": 0}, "pipe: expected a pipeline, whose autoencoder"),
        (as_reward_fn(reward, pipe), latents, (PROMPTS,), {"sigma": 0.5}, "sigma: a clean reward reads clean latents"),
        (as_reward_fn(value), images, (PROMPTS,), {}, "pipe: expected a pipeline, whose autoencoder reads images"),
        (as_reward_fn(value), latents, (PROMPTS, [{"sigma": 1}, {}, {}]), {}, "metadata: expected a sigma for each"),
        (as_reward_fn(value), latents, (PROMPTS,), {"sigma": [0.5, 0.5]}, "sigma: expected one number or 3"),
        (as_reward_fn(value), latents, (PROMPTS,), {"sigma": 1.5}, r"sigma: expected numbers in \[0, 1\]"),
        (as_reward_fn(value), images, (PROMPTS,), {"sigma": 0.5}, "latents: this value model was made for latents"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            score(samples, *arguments, **options)


# -- docs/rl_engines.md ------------------------------------------------------------------------------------------------


@pytest.fixture
def examples(tmp_path, pipe):
    """What the guide's blocks define, in order, with small models for the folders that they name; and the value."""
    tiny.tiny_pipeline(t5=True).save_pretrained(tmp_path / "backbone-folder")
    rewards.write_open_clip(tmp_path / "clip-folder")
    value = stitched_value(pipe, 2, reward=load_reward("clip", tmp_path / "clip-folder").eval())
    value.save_pretrained(tmp_path / "value-folder")
    found = []
    for block in re.findall(r"```py\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        program = re.sub(r'"([a-z]+-folder)"', lambda name: repr(str(tmp_path / name[1])), block)
        found.append({})
        exec(compile(program, str(GUIDE), "exec"), found[-1])
    return *found, value


@pytest.fixture
def flow_factory(monkeypatch):
    """The two names that the guide imports from Flow-Factory."""

    class PointwiseRewardModel:
        def __init__(self, config, accelerator):
            self.device, self.dtype = accelerator.device, config.dtype

    @dataclass
    class RewardModelOutput:
        rewards: torch.Tensor
        extra_info: dict | None = None

    module = types.ModuleType("flow_factory.rewards")
    module.PointwiseRewardModel, module.RewardModelOutput = PointwiseRewardModel, RewardModelOutput
    monkeypatch.setitem(sys.modules, "flow_factory", types.ModuleType("flow_factory"))
    monkeypatch.setitem(sys.modules, "flow_factory.rewards", module)


def test_the_guides_examples(flow_factory, examples, pipe):
    trl, factory, verl, value = examples
    images = rand(3, 3, 32, 32)
    encoded = reference(value, backbone_of(pipe).encode_images(pipe.vae, images), 0.0)

    # TRL: AlignProp's step differentiates 10 - mean, DDPO's turns scores into a tensor.
    leaf = images.clone().requires_grad_()
    scores, extra = trl["reward_fn"](leaf, PROMPTS, [{}] * 3)
    (10.0 - scores.mean()).backward()
    assert leaf.grad.abs().sum() > 0 and extra == {}
    assert torch.as_tensor(trl["reward_fn"](images, tuple(PROMPTS), tuple([{}] * 3))[0], device="cpu").shape == (3,)

    # Flow-Factory: batches of the samples' fields, by the names of the call's arguments.
    model = factory["StitchedReward"](types.SimpleNamespace(dtype=torch.float32), types.SimpleNamespace(device="cpu"))
    fields = {"prompt": PROMPTS, "image": list(images), "metadata": ['{"source": 1}'] * 3}
    output = model(**fields)
    torch.testing.assert_close(torch.as_tensor(output.rewards, device="cpu", dtype=torch.float32), encoded)

    # verl-omni: one sample by keyword; keys of the configuration are keywords too.
    sample = {"data_source": "prompts", "ground_truth": PROMPTS[0], "extra_info": {"num_turns": 1}}
    assert verl["compute_score_stitched"](solution_image=images[0], **sample)["score"] == pytest.approx(
        encoded[0].item(), abs=1e-5
    )
    latent = rand(1, backbone_of(pipe).latent_channels, 16, 16)
    found = verl["compute_score_stitched"](solution_image=latent[0], sigma=0.4, **sample)["score"]
    expected = value.value(latent, 0.4, Condition((PROMPTS[0],), {})).item()
    assert isinstance(found, float) and found == pytest.approx(expected, abs=1e-5)
