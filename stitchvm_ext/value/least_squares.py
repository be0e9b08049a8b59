"""Least squares from sums over batches of tokens: for every depth of a backbone onto every layer of a reward.

The sums are about a fixed shift per position, the mean of the first batch, and from them follow the scatter about the
mean of each position and that about the mean of all. What grows with the number of images is nothing.

Of the two products of a batch, that of the features with themselves is taken in float64, because a pseudo-inverse
reads its smallest eigenvalues. That of the features with the targets, five times as large, is taken in float32 over
:data:`FLOAT32_ROWS` tokens at most and added up in float64. That moves the held-out loss by less than 1e-6 of itself at
condition numbers of the features up to 1e4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Eigenvalues of a Gram matrix below this share of the largest count as zero: features are float32, so directions whose
# standard deviation is below 1e-5 of the largest hold rounding noise.
RELATIVE_CUTOFF = 1e-10
ROWS = 2048  # tokens of one product: bounds the copies, which then stay in memory that is already mapped
FLOAT32_ROWS = 4 * ROWS  # tokens that float32 adds up
_BLOCK = 256  # columns of a block of the symmetric product


class PositionSums:
    """Sums of tokens per position, float64, about the mean of the first batch."""

    def __init__(self):
        self.images = 0
        self.shift: Tensor | None = None  # [P, C], float32
        self.sum: Tensor | float = 0.0  # [P, C]

    def add(self, tokens: Tensor) -> Tensor:
        """Tokens [B, P, C] without the shift, in float32: what the products take."""
        if self.shift is None:
            self.shift = tokens.mean(0, dtype=torch.float64).float()
        self.images += len(tokens)
        tokens = tokens.float() - self.shift
        self.sum = self.sum + tokens.double().sum(0)
        return tokens

    @property
    def offset(self) -> Tensor:
        """The mean about the shift, [P, C]."""
        return self.sum / self.images

    @property
    def mean(self) -> Tensor:
        """[P, C], float64."""
        return self.shift.double() + self.offset


class LeastSquares:
    """The sums of one depth: features against the targets of all layers side by side."""

    def __init__(self):
        self.features = PositionSums()
        self.gram: Tensor | None = None  # Σ f fᵀ about the shift, upper triangle [C, C]
        self.cross: Tensor | None = None  # Σ f gᵀ about the shifts [C, D]

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Features [B, P, C] as they are, and targets [B, P, D] that :meth:`PositionSums.add` returned."""
        _, positions, channels = features.shape
        if self.gram is None:
            self.gram = features.new_zeros(channels, channels, dtype=torch.float64)
            self.cross = features.new_zeros(channels, targets.shape[2], dtype=torch.float64)
        few, many = max(1, ROWS // positions), max(1, FLOAT32_ROWS // positions)
        for features_part, targets_part in zip(features.split(many), targets.split(many), strict=True):
            product = features.new_zeros(self.cross.shape, dtype=torch.float32)
            for f, g in zip(features_part.split(few), targets_part.split(few), strict=True):
                f = self.features.add(f).flatten(0, 1)
                with full_float32():
                    product.addmm_(f.T, g.flatten(0, 1))
                f = f.double()
                for start in range(0, channels, _BLOCK):
                    rows = self.gram[start : start + _BLOCK, start:]
                    rows.addmm_(f[:, start : start + _BLOCK].T, f[:, start:])
            self.cross += product

    def solve(self, targets: PositionSums, per_position: slice) -> Fit:
        """The solution for every target column, by pseudo-inverse.

        The columns of ``per_position`` get a bias per position, the others one for all.
        """
        f, g, count = self.features.offset, targets.offset, targets.images
        gram = self.gram.triu() + self.gram.triu(1).T - count * f.T @ f
        cross = self.cross - count * f.T @ g
        f, g = self.features.mean, targets.mean
        shared = torch.ones(cross.shape[1], dtype=torch.bool, device=cross.device)
        shared[per_position] = False
        w = torch.empty_like(cross)
        if not shared.all():
            w[:, per_position] = pseudo_inverse(gram) @ cross[:, per_position]
        if shared.any():  # the scatter of the positions' means comes on top
            between = f - f.mean(0)
            inverse = pseudo_inverse(gram + count * between.T @ between)
            w[:, shared] = inverse @ (cross[:, shared] + count * between.T @ g[:, shared])
        expected = f @ w
        bias = g - expected
        bias[:, shared] = bias[:, shared].mean(0)
        return Fit(w.T.float(), bias.float(), f.float(), (expected + bias).float())


@dataclass
class Fit:
    """g = W f + b at a position, in float32.

    Attributes:
        weight: W [D, C].
        bias: b [P, D].
        features: the mean features [P, C] of the fit.
        expected: the prediction for those, W f + b [P, D].
    """

    weight: Tensor
    bias: Tensor
    features: Tensor
    expected: Tensor

    def squared_error(self, features: Tensor, targets: Tensor, parts: int) -> Tensor:
        """Σ |g - W f - b|² over features [B, P, C] and targets [B, P, D], float64 for each of equal parts of D."""
        total = torch.zeros(parts, dtype=torch.float64, device=targets.device)
        images = max(1, ROWS // targets.shape[1])
        for f, g in zip(features.split(images), targets.split(images), strict=True):
            rest, f = (g - self.expected).flatten(0, 1), (f - self.features).flatten(0, 1)
            with full_float32():
                rest.addmm_(f, self.weight.T, alpha=-1)
            total += squares(rest, parts)
        return total


def squares(tokens: Tensor, parts: int) -> Tensor:
    """Sums of squares of each of equal parts of the last dimension, float64 [parts]."""
    norms = torch.linalg.vector_norm(tokens.unflatten(-1, (parts, -1)), dim=-1)
    return norms.double().square_().flatten(0, -2).sum(0)


def pseudo_inverse(gram: Tensor) -> Tensor:
    """Of a symmetric positive semidefinite matrix, with :data:`RELATIVE_CUTOFF`.

    By Cholesky where the factor proves that no eigenvalue is below the cutoff, otherwise by eigenvalues.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        inverse = torch.cholesky_inverse(factor)
        if gram.norm() * inverse.norm() < 1 / RELATIVE_CUTOFF:  # an upper bound of the condition number
            return inverse
    return torch.linalg.pinv(gram, rtol=RELATIVE_CUTOFF, hermitian=True)


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever shorter format the program allows for them elsewhere."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
