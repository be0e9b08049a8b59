import pytest
import torch

from stitchvm_ext.backbones import Condition, backbone_of
from tests import tiny


@pytest.fixture
def pipe():
    return tiny.tiny_pipeline()


@pytest.fixture
def reward():
    return tiny.tiny_reward()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")


@pytest.fixture
def condition(pipe):
    backbone = backbone_of(pipe)
    prompts = ("a red circle", "two blue squares")
    cond = backbone.encode_text(pipe, list(prompts), max_sequence_length=0)
    uncond = backbone.encode_text(pipe, ["", ""], max_sequence_length=0)
    return Condition(prompts, cond, uncond, guidance_scale=3.0)


@pytest.fixture
def latents():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
