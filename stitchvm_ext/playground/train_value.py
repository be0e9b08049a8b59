"""Stage 4 of the playground's training: the stitched value models, by the library's own ``stitch``.

The baseline without the backbone, which stitches to the VAE latent, gets three times the steps, as in the paper.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..value import FinetuneConfig, stitch
from . import load_pipeline, load_reward

PROBE_PICTURES = 200
TRAINING_PICTURES = 12800
# The reward is small and trained for minutes, so it takes a far higher rate than METHOD.md's for large pretrained
# towers.
CONFIG = FinetuneConfig(
    epochs=3,
    batch_size=64,
    learning_rate=5e-4,
    stitch_multiplier=3.0,
    warmup_steps=50,
    final_share=0.05,
    save_every=100,
)
VAE_ONLY_CONFIG = replace(CONFIG, epochs=3 * CONFIG.epochs)


def train_value(weights: Path, work: Path, images: Tensor, vae_only: bool = False, scale: float = 1.0) -> None:
    """Stitch the packed reward onto the packed pipeline and save the value model, float16, beside them.

    Args:
        weights: folder with pipeline/ and reward/, which receives value/ or value_vae_only/.
        work: folder of cached targets and resumable states.
        images: training pictures, uint8 [N, 3, 64, 64]; the first 200 serve the search.
        scale: share of the pictures, for smoke tests.
    """
    count = min(len(images), max(round(scale * (PROBE_PICTURES + TRAINING_PICTURES)), 32))
    probe_images = min(PROBE_PICTURES, count // 4)
    config = VAE_ONLY_CONFIG if vae_only else CONFIG
    pipe, reward = load_pipeline(weights), load_reward("clip", folder=weights)
    name = "value_vae_only" if vae_only else "value"
    value = stitch(
        pipe,
        reward,
        images[:count],
        depth=0 if vae_only else None,
        layer=1 if vae_only else None,
        work_dir=work,
        probe_images=probe_images,
        backbone_licence="Apache-2.0",
        config=replace(config, batch_size=min(config.batch_size, count - probe_images)),
    )
    value.suffix.reference = {"name": "../reward", "pretrained": None}  # wherever the folder lies
    value.stitch.half()
    value.suffix.half()  # but not the null text, which is to equal the pipeline's own encoding exactly
    value.save_pretrained(weights / name)
