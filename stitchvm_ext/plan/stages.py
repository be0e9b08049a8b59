"""What it costs to make a stitched value: the search for the place to cut, and the finetuning."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .count import Cost, Kernel
from .pieces import Pieces

PROBE_IMAGES = 200  # METHOD.md §3
LAYERS_SEARCHED = 4  # j = 1..4
AT_ONCE = 8  # images in one batch of a GPU


@dataclass(frozen=True)
class Stage:
    """A stage of making a value model.

    Attributes:
        cost: of the whole stage.
        images: how many pass through it, each once per epoch.
    """

    name: str
    cost: Cost
    images: int


def search(pieces: Pieces) -> Stage:
    """Stage 1: all depths and the first layers in one pass over the probe images.

    Per depth the products of the features with themselves (half of them, symmetric) in float64 and with the targets in
    float32, then two factorisations.
    """
    depths = sum(pieces.kinds)
    per_image = pieces.rewards.encode(1) + pieces.denoise(1) + pieces.rewards.reward(1)
    kernels: Counter[Kernel] = Counter()
    c = pieces.width
    for reward in pieces.rewards.towers(pieces.rewards.base):
        rows = PROBE_IMAGES * reward.grid[0] * reward.grid[1]
        d = LAYERS_SEARCHED * reward.width
        kernels[Kernel("float64 product", False, rows * c * c, 8 * rows * c)] += depths
        kernels[Kernel("float32 product", False, 2 * rows * c * d, 4 * rows * (c + d))] += depths
        kernels[Kernel("float64 product", False, 2 * c**3 + 4 * c * c * d, 8 * c * (c + d))] += depths
    return Stage("search (stage 1)", per_image * PROBE_IMAGES + Cost(kernels), PROBE_IMAGES)


def finetune(pieces: Pieces, images: int, epochs: int) -> list[Stage]:
    """Stage 2: encoding everything anew, and from caches of latents and targets that the first epoch fills.

    Per image in a batch of 8 on a GPU; the gradient of stitch and suffix, the frozen prefix without one.
    """
    share = 1 / AT_ONCE
    once = (pieces.rewards.encode(AT_ONCE) + pieces.rewards.reward(AT_ONCE)) * share
    anew = once + (pieces.prefix(AT_ONCE) + pieces.rewards.train_suffix(AT_ONCE)) * share
    cached = (pieces.prefix(AT_ONCE, memory="save") + pieces.rewards.train_suffix(AT_ONCE)) * share
    return [
        Stage("finetuning (stage 2), images encoded anew", anew * (images * epochs), images),
        Stage("finetuning (stage 2), latents and targets cached", cached * (images * epochs) + once * images, images),
    ]
