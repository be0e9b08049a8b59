"""Stage 3 of the playground's training: a CLIP, and an aesthetic head on its embeddings.

Contrastive learning in which equal captions count as matches, with two training-only heads: the count of every (colour,
shape) from the embedding before its normalisation, and the colours and shapes that cover each patch. Half of every
batch went through the autoencoder, so that the reward knows decoded pictures. Another seed gives the held-out reward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from . import models, world
from .optim import Muon, step_seed

STEPS = 800
BATCH = 96
KINDS = [(color, shape) for color in world.COLORS for shape in world.SHAPES]


def object_counts(objects: list[world.Shape]) -> list[int]:
    """How often each of the 30 (colour, shape) kinds occurs: 30 numbers in 0..3."""
    kinds = [o.kind for o in objects]
    return [kinds.count(kind) for kind in KINDS]


def to_pixels(images: Tensor, mean, std) -> Tensor:
    """uint8 [B, 64, 64, 3] -> the CLIP's normalised input [B, 3, 64, 64]."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def _contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    logits = scale * image @ text.T
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return -(target * logits.log_softmax(1)).sum(1).mean() / 2 - (target * logits.log_softmax(0)).sum(0).mean() / 2


def train_reward(
    images: Tensor, decoded: Tensor, captions: list[str], counts: Tensor, covers: Tensor,
    steps: int = STEPS, seed: int = 0, device: str = "cpu",
):  # fmt: skip
    """Train on images, uint8 [N, 64, 64, 3], and the reconstructions of the first M of them, [M, 64, 64, 3].

    Args:
        counts: [N, 30] in 0..3, see :func:`object_counts`.
        covers: [N, 64, 11], see :func:`train_generator.patch_cover`.
    Returns:
        the open_clip CLIP and its aesthetic head, in eval mode.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    clip = CLIP(**models.CLIP_CONFIG, output_dict=False).to(device)
    width = models.CLIP_CONFIG["embed_dim"]
    head = models.build_aesthetic_head().to(device)
    training_only = nn.ModuleDict(
        {"counts": nn.Linear(width, len(KINDS) * 4), "cover": nn.Linear(width, covers.shape[-1])}
    ).to(device)
    everything = nn.ModuleDict({"clip": clip, "head": head, "training_only": training_only})
    clip.visual.output_tokens = True
    optimizer = Muon(
        everything, lr=2e-3, lr_adam=1.5e-3, weight_decay=0.02,
        adam_names=("embed", "positional", "logit", "conv1", "head.", "training_only"),
    )  # fmt: skip
    ids = models.tokenize(models.build_tokenizer(), captions)
    progress = trange(steps, desc=f"reward (seed {seed})", mininterval=10)
    for step in progress:
        rng = torch.Generator().manual_seed(step_seed(seed, step))
        pick = torch.randint(len(images), (BATCH,), generator=rng)
        pick[BATCH // 2 :] %= len(decoded)
        picked = torch.cat([images[pick[: BATCH // 2]], decoded[pick[BATCH // 2 :]]])
        pixels = to_pixels(picked, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD).to(device)
        raw, tokens = clip.visual(pixels)
        image = F.normalize(raw, dim=-1)
        text = F.normalize(clip.encode_text(ids[pick].to(device)), dim=-1)
        contrastive = _contrastive_loss(image, text, clip.logit_scale.exp().clamp(max=100), ids[pick].to(device))
        target = world.aesthetic(picked.permute(0, 3, 1, 2).float().to(device) / 255)
        score = F.smooth_l1_loss(head(image), target)
        count_logits = training_only["counts"](raw).view(BATCH * len(KINDS), 4)
        count_loss = F.cross_entropy(count_logits, counts[pick].flatten().to(device))
        cover_loss = F.binary_cross_entropy_with_logits(training_only["cover"](tokens), covers[pick].float().to(device))
        loss = contrastive + score + 10 * count_loss + cover_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
        optimizer.step(min(1, (step + 1) / 30) * (1 - 0.98 * step / steps))
        if step % 25 == 0:
            if not torch.isfinite(loss):
                raise FloatingPointError(f"reward: the loss is {loss.item()} at step {step}")
            progress.set_postfix(
                contrastive=f"{contrastive.item():.3f}", score=f"{score.item():.4f}",
                counts=f"{count_loss.item():.4f}", cover=f"{cover_loss.item():.4f}",
            )  # fmt: skip
    clip.visual.output_tokens = False
    return clip.eval().cpu(), head.eval().cpu()
