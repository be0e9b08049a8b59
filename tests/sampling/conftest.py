import pytest
import torch

from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.value.stitch_layer import StitchLayer
from stitchvm_ext.value.stitched import StitchedValue
from tests import tiny

TEXT = {"max_sequence_length": 0}  # the tiny pipeline has no T5


@pytest.fixture
def pipe():
    return tiny.tiny_pipeline()


@pytest.fixture
def reward():
    return tiny.tiny_reward()


@pytest.fixture
def make_stitched(reward):
    """Makes a stitched value with a random stitch: sampling does not care whether it was trained."""

    def make(pipe, depth: int = 2, latent_size: tuple[int, int] = (16, 16), **text) -> StitchedValue:
        backbone = backbone_of(pipe)
        torch.manual_seed(0)
        value = StitchedValue(
            backbone,
            StitchLayer(backbone.width(depth), reward.width, reward.grid),
            reward.suffix(1),
            depth=depth,
            layer=1,
            latent_size=latent_size,
            null_condition=backbone.null_condition(pipe, **text),
            text_options=text,
        )
        return value.eval().requires_grad_(False)

    return make


@pytest.fixture
def stitched(pipe, make_stitched):
    return make_stitched(pipe, **TEXT)


@pytest.fixture
def seeds():
    """Makes fresh generators, one per sample."""
    return lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]


@pytest.fixture
def block_rows(pipe):
    """The number of samples of each call of each transformer block, in order."""
    rows = []
    handles = [
        block.register_forward_pre_hook(
            lambda m, a, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        for block in pipe.transformer.transformer_blocks
    ]
    yield rows
    for handle in handles:
        handle.remove()
