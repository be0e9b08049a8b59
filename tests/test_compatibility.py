"""Every backbone with every reward: search, 20 training steps, save, load, value and gradient.

``STITCHVM_WRITE_TABLE=1 pytest tests/test_compatibility.py`` writes what came out to docs/compatibility.md.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

from stitchvm_ext import FinetuneConfig, StitchedValue, stitch
from stitchvm_ext.backbones import Condition, backbone_of
from tests.tiny.catalogue import PIPELINES
from tests.tiny.rewards import REWARDS

PROMPTS = ("a red circle", "two blue rings")
TRAINING = FinetuneConfig(epochs=10, batch_size=4, learning_rate=1e-3, warmup_steps=1)  # 8 images: 20 steps
DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    return {kind: load(tmp_path_factory.mktemp(kind)) for kind, load in REWARDS.items()}


@pytest.fixture(scope="module")
def table():
    """(backbone, reward) -> what the cell says; written where that is asked for and every pair has run."""
    cells: dict[tuple[str, str], str] = {}
    yield cells
    if os.environ.get("STITCHVM_WRITE_TABLE") and len(cells) == len(PIPELINES) * len(REWARDS):
        DOCUMENT.write_text(markdown(cells))


def markdown(cells: dict[tuple[str, str], str]) -> str:
    rows = ["| " + " | ".join([name, *(cells[name, kind] for kind in REWARDS)]) + " |" for name in PIPELINES]
    return "\n".join(
        [
            "# Backbones and rewards",
            "",
            "Written by `STITCHVM_WRITE_TABLE=1 pytest tests/test_compatibility.py` on small random models in the real",
            "formats: each pair is searched, trained for 20 steps, saved and loaded, and then gives the same value and",
            "gradient, bit for bit. A cell holds the cut that the search picked: backbone block i, reward block j.",
            "Random models say nothing of how well real ones fit.",
            "",
            "| | " + " | ".join(REWARDS) + " |",
            "|---|" + "---|" * len(REWARDS),
            *rows,
            "",
        ]
    )


@pytest.mark.parametrize("kind", list(REWARDS))
@pytest.mark.parametrize("name", list(PIPELINES))
def test_pair(name, kind, rewards, table, tmp_path):
    pipe, reward = PIPELINES[name](), rewards[kind]
    backbone = backbone_of(pipe)
    latent_size = backbone.latent_size(pipe, *getattr(pipe, "test_size", (None, None)))
    image_size = tuple(side * backbone.pixel_factor(pipe) for side in latent_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(16, 3, 4, 4, generator=generator), image_size, mode="bilinear")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*distilled to few steps.*")
        value = stitch(
            pipe, reward, images, work_dir=tmp_path / "work", probe_images=8, config=TRAINING, progress=False
        )
    frames = (1,) if backbone.is_video else ()
    latents = torch.randn(2, backbone.latent_channels, *frames, *latent_size, generator=generator)
    condition = Condition(PROMPTS, backbone.encode_text(pipe, list(PROMPTS)))
    before = value.value_and_grad(latents, 0.5, condition)

    value.save_pretrained(tmp_path / "value")
    loaded = StitchedValue.from_pretrained(tmp_path / "value", pipe)
    after = loaded.value_and_grad(latents, 0.5, condition)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert before[1].shape == latents.shape and before[1].isfinite().all()
    assert all((grad != 0).any() for grad in before[1])
    table[name, kind] = f"{value.depth}, {value.layer}"


def test_the_document_has_every_pair():
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    assert lines[0] == "| | " + " | ".join(REWARDS) + " |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]] == list(PIPELINES)
