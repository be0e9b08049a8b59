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
def stitched(pipe, reward):
    """A stitched value with a random stitch at depth 2 of 4: sampling does not care whether it was trained."""
    backbone = backbone_of(pipe)
    torch.manual_seed(0)
    stitch = StitchLayer(backbone.width(), reward.width, reward.grid)
    null = backbone.null_condition(pipe, **TEXT)
    return (
        StitchedValue(
            backbone,
            stitch,
            reward.suffix(1),
            depth=2,
            layer=1,
            latent_size=(16, 16),
            null_condition=null,
            text_options=TEXT,
        )
        .eval()
        .requires_grad_(False)
    )


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
