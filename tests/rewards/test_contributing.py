"""The example of CONTRIBUTING.md, "Adding a reward", runs and is a reward."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torchvision.models.vision_transformer import VisionTransformer

from stitchvm_ext import StitchedValue, stitch
from stitchvm_ext.backbones import Condition
from stitchvm_ext.rewards import REGISTRY
from stitchvm_ext.value import FinetuneConfig
from tests import tiny

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
SETTINGS = {
    "image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64,
    "num_classes": 5,
}  # fmt: skip


@pytest.fixture
def example():
    if not GUIDE.is_file():
        pytest.skip("CONTRIBUTING.md is not beside these tests")
    section = GUIDE.read_text().split("\n## Adding a reward\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict = {"__name__": "example"}
    exec(compile(code, str(GUIDE), "exec"), names)
    yield names["TorchvisionReward"]
    del REGISTRY["TorchvisionReward"]


def test_the_example_is_a_reward_that_can_be_stitched(example, tmp_path):
    torch.manual_seed(0)
    vit = VisionTransformer(**SETTINGS).eval().requires_grad_(False)
    vit.heads.head.weight.normal_()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    reward = example(SETTINGS, 3, str(tmp_path / "vit.pth"))
    images = torch.rand(32, 3, 32, 32)

    with torch.no_grad():
        expected = vit(reward.preprocess(images[:4]))[:, 3]
        assert expected.std() > 0.01
        torch.testing.assert_close(reward(images[:4]), expected, rtol=1e-5, atol=1e-5)
        for layer, tokens in reward.entering_tokens(images[:4], [1, 2, 3]).items():
            suffix = reward.suffix(layer)
            assert {p.requires_grad for p in suffix.blocks[layer - 1].parameters()} == {True}
            assert not any(p.requires_grad for p in suffix.head_parameters())
            score = suffix.score(suffix.forward_from(tokens, layer), None)
            torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)

    pipe = tiny.tiny_pipeline()
    value = stitch(
        pipe, reward, images, depth=2, layer=2, work_dir=tmp_path / "work", probe_images=8,
        config=FinetuneConfig(epochs=1, batch_size=8), text_options={"max_sequence_length": 0}, progress=False,
    )  # fmt: skip
    value.save_pretrained(tmp_path / "value")
    again = StitchedValue.from_pretrained(tmp_path / "value", pipe)
    encoding = value.backbone.encode_text(pipe, ["a red circle"], max_sequence_length=0)
    condition, z = Condition(("a red circle",), encoding), torch.randn(1, 4, 16, 16)
    (before, _), (after, grad) = (v.value_and_grad(z, 0.5, condition) for v in (value, again))
    assert torch.equal(before, after) and grad.abs().amax() > 0
