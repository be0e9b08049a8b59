"""How well scores agree with people and with each other: one implementation of each measure for the whole library."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors [N]; equal values share their mean rank. NaN where one of them is constant."""

    def ranks(x: Tensor) -> Tensor:
        _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def variance_explained(estimate: Tensor, truth: Tensor) -> float:
    """R² of an estimate [N] without refitting."""
    return (1 - (estimate - truth).square().mean() / truth.var(correction=0)).item()


def number_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], list[set[int]]]:
    """The distinct captions of all images, and for every image the positions of its own among them."""
    number: dict[str, int] = {}
    own = [{number.setdefault(caption, len(number)) for caption in mine} for mine in captions]
    return list(number), own


def retrieval_at_1(images: Tensor, texts: Tensor, own: Sequence[Collection[int]], rows: int = 1024) -> float:
    """Image-to-text R@1: the share of images whose nearest text is one of their own.

    Args:
        images, texts: normalised embeddings [N, D] and [M, D].
        own: for every image the positions of its texts, see :func:`number_captions`.
        rows: images that are compared at a time; the matrix [N, M] is never held.
    """
    nearest = torch.cat([(part @ texts.T).argmax(1) for part in images.split(rows)]).tolist()
    return sum(text in mine for text, mine in zip(nearest, own, strict=True)) / len(nearest)


def preference_accuracy(scores: Tensor, ranks: Tensor, group_sizes: Sequence[int]) -> float:
    """Share of pairs within a group that scores order as people did, averaged over groups as HPSv2's benchmark does.

    Pairs that people ranked equal do not count, nor do groups without other pairs; equal scores are no order.

    Args:
        scores: [N], larger is better.
        ranks: people's [N], smaller is better.
        group_sizes: how many of the N belong to each group (prompt), in order.
    """
    shares = []
    for s, r in zip(scores.split(list(group_sizes)), ranks.split(list(group_sizes)), strict=True):
        better = r[:, None] < r[None, :]
        if better.any():
            shares.append((s[:, None] > s[None, :])[better].double().mean())
    return torch.stack(shares).mean().item() if shares else float("nan")
