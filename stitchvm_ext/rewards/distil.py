"""Any black box that scores images, distilled into a scalar head on a pretrained ViT: a reward that can be stitched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm, trange

from ..data import as_image_tensor
from ..data.source import as_unit_images
from .base import RewardModel
from .distilled import DistilledReward
from .scalar_head import ScalarHead

HELD_OUT_AT_LEAST = 8


@dataclass(frozen=True)
class DistilConfig:
    """Settings of :func:`distil_reward`.

    Attributes:
        epochs: passes over the images.
        batch_size: images per step, and per call of the black box.
        learning_rate: of the head; it falls linearly to zero.
        tower_learning_rate: of a copy of the image tower; 0 keeps the tower frozen, so that it runs once per image.
        weight_decay: of the head.
        hidden: width of the head's hidden layer.
        held_out: share of the images that the report is measured on.
        seed: of the split, the head's start and the batches.
    """

    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    tower_learning_rate: float = 0.0
    weight_decay: float = 1e-2
    hidden: int = 256
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0 or not self.tower_learning_rate >= 0:
            raise ValueError(
                "learning_rate, tower_learning_rate: expected a positive number and one of at least 0, "
                f"got {self.learning_rate} and {self.tower_learning_rate}"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {self.held_out}")


def distil_reward(
    score_fn: Callable[[Tensor, list[str] | None], Any],
    student: RewardModel,
    images: Tensor | Sequence[Any],
    prompts: Sequence[str] | None = None,
    *,
    config: DistilConfig | None = None,
    licence: str | None = None,
    progress: bool = True,
) -> DistilledReward:
    """Train a scalar head on a pretrained tower to predict a black box, so that it can be stitched like any reward.

    Nothing is written until ``save_pretrained`` is called on the result.

    Args:
        score_fn: ``score_fn(images, prompts)``: images float [B, 3, H, W] in [0, 1], B prompts or None, to B numbers.
            It is called once per image, without gradients.
        student: brings the image tower, and with prompts the text tower (CLIP-like: text embeddings of the images'
            width). It stays untouched.
        images: [N, 3, H, W] uint8 or float in [0, 1], or PIL images of one size.
        prompts: one per image, if the black box reads them.
        licence: of the black box, where it binds what is trained on its scores; added to the student's.

    Returns:
        the reward; ``reward.report`` holds R2 and Spearman's rank correlation on the held-out images.
    Raises:
        ValueError, TypeError: an argument does not fit, or scores that are not B finite numbers, or all the same.
    """
    config = config or DistilConfig()
    if not isinstance(student, RewardModel):
        raise TypeError(f"student: expected a stitchvm_ext.rewards.RewardModel, got {type(student).__name__}")
    student.check_whole()
    images = as_image_tensor(images)
    held_out = round(config.held_out * len(images))
    if held_out < HELD_OUT_AT_LEAST or len(images) - held_out < HELD_OUT_AT_LEAST:
        raise ValueError(
            f"images: expected at least {HELD_OUT_AT_LEAST} to train on and to hold out (held_out {config.held_out}), "
            f"got {len(images)} in all"
        )
    if prompts is not None:
        prompts = list(prompts)
        if len(prompts) != len(images):
            raise ValueError(f"prompts: expected {len(images)}, one per image, got {len(prompts)}")
        text = student.encode_condition(prompts[:1])
        if not isinstance(text, Tensor) or text.ndim != 2:
            raise ValueError(
                f"student: expected a reward with text embeddings, to score for prompts, got {type(student).__name__}"
            )
    scores = _black_box_scores(score_fn, images, prompts, config.batch_size, progress)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    test, train = order[:held_out], order[held_out:]
    if not scores[train].std() > 0 or not scores[test].std() > 0:
        raise ValueError(f"score_fn: expected scores that differ, got {scores[0].item():g} for nearly all images")

    trained = config.tower_learning_rate > 0
    tower = copy.deepcopy(student) if trained else student
    licences = [name for name in (getattr(student, "licence", None), licence) if name]
    reward = DistilledReward(
        tower,
        ScalarHead({0: (1, 1)}),
        conditioned=prompts is not None,
        tower_trained=trained,
        licence=" and ".join(licences) or None,
    )
    data = _Data(reward, images, prompts, config.batch_size, progress)
    _train(reward, data, scores, train, config, progress)
    with torch.no_grad():
        predicted = torch.cat([reward.head(data.inputs(rows)).float().cpu() for rows in test.split(config.batch_size)])
    true = scores[test]
    reward.report = {
        "images": len(train),
        "held-out images": len(test),
        "held-out R2": 1 - ((predicted - true).square().sum() / (true - true.mean()).square().sum()).item(),
        "held-out Spearman": spearman(predicted, true),
    }
    return reward


@torch.no_grad()
def _black_box_scores(score_fn, images: Tensor, prompts: list[str] | None, batch_size: int, progress: bool) -> Tensor:
    """Float32 [N]."""
    rows = []
    for start in trange(0, len(images), batch_size, desc="black box", disable=not progress):
        part = slice(start, start + batch_size)
        batch = as_unit_images(images[part])
        found = score_fn(batch, None if prompts is None else prompts[part])
        found = torch.as_tensor(found, dtype=torch.float32).detach().cpu()
        if found.shape != (len(batch),):
            raise ValueError(f"score_fn: expected {len(batch)} scores, one per image, got shape {list(found.shape)}")
        if not found.isfinite().all():
            bad = int((~found.isfinite()).nonzero()[0])
            raise ValueError(f"score_fn: expected finite scores, got {found[bad].item()} for image {start + bad}")
        rows.append(found)
    return torch.cat(rows)


class _Data:
    """The head's inputs by image: embeddings kept from one pass of a frozen tower, or computed anew as it trains."""

    def __init__(self, reward: DistilledReward, images: Tensor, prompts: list[str] | None, batch_size: int, progress):
        self.reward, self.images, self.prompts = reward, images, prompts
        self.kept: Tensor | None = None
        if not reward.tower_trained:
            rows = torch.arange(len(images)).split(batch_size)
            with torch.no_grad():
                kept = [self.embeddings(r) for r in tqdm(rows, desc="student", disable=not progress)]
            self.kept = torch.cat(kept)

    def embeddings(self, rows: Tensor) -> Tensor:
        if self.kept is not None:
            return self.kept[rows.to(self.kept.device)]
        return self.reward.output(as_unit_images(self.images[rows]).to(self.reward.device), pooled_only=True).normalized

    def inputs(self, rows: Tensor) -> Tensor:
        """[B, D] or [B, 3 D]."""
        condition = None if self.prompts is None else self.reward.encode_condition([self.prompts[r] for r in rows])
        return self.reward.head_input(self.embeddings(rows), condition)


def _train(reward: DistilledReward, data: _Data, scores: Tensor, train: Tensor, config: DistilConfig, progress) -> None:
    """Give the reward a trained head, and train its tower if the configuration says so."""
    with torch.no_grad():
        inputs = torch.cat([data.inputs(rows) for rows in train.split(config.batch_size)])
    # The network learns standardised scores from standardised inputs; both are folded into its layers at the end.
    centre, spread = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
    mean, std = scores[train].mean().item(), scores[train].std().item()
    device = reward.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = ScalarHead({0: (config.hidden, inputs.shape[1]), 2: (1, config.hidden)}, "gelu").to(device)
    groups = [{"params": list(head.parameters()), "lr": config.learning_rate, "weight_decay": config.weight_decay}]
    if reward.tower_trained:
        frozen = {id(p) for p in reward.tower.head_parameters()}
        tower = [p.requires_grad_() for p in reward.tower.parameters() if id(p) not in frozen]
        groups.append({"params": tower, "lr": config.tower_learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    parameters = [p for group in groups for p in group["params"]]
    steps = config.epochs * -(-len(train) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in (bar := trange(config.epochs, desc="distil", disable=not progress)):
        for rows in train[torch.randperm(len(train), generator=generator)].split(config.batch_size):
            target = ((scores[rows] - mean) / std).to(device)
            loss = F.mse_loss(head((data.inputs(rows) - centre) / spread), target)
            if not loss.isfinite():
                raise FloatingPointError(f"distil_reward: the loss is {loss.item()}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        first, last = head.layers[0], head.layers[2]
        first.weight.div_(spread)
        first.bias.sub_(first.weight @ centre)
        last.weight.mul_(std)
        last.bias.mul_(std).add_(mean)
    reward.head = head
    reward.requires_grad_(False)
    reward.eval()


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors [N]; equal values share their mean rank."""

    def ranks(x: Tensor) -> Tensor:
        _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()
