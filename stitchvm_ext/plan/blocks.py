"""Costs of deep networks from those of shallow ones: a block beyond the counted ones costs what one more did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .count import Cost


def leading(kinds: Sequence[int], first: int) -> tuple[int, ...]:
    """The fewest blocks of each kind that hold the ``first`` ones whole, and one of every kind at least."""
    found, left = [], first
    for blocks in kinds:
        found.append(min(blocks, max(left, 1)))
        left -= found[-1]
    return tuple(found)


def with_one_more(base: tuple[int, ...]) -> list[tuple[int, ...]]:
    """``base`` itself, then with one more block of each kind in turn."""
    return [base, *(tuple(n + (k == kind) for k, n in enumerate(base)) for kind in range(len(base)))]


def scaled_number(numbers: Sequence[int], kinds: Sequence[int], base: Sequence[int]) -> int:
    """A figure of ``kinds`` blocks from those of :func:`with_one_more`."""
    first, *others = numbers
    return first + sum((blocks - have) * (n - first) for n, blocks, have in zip(others, kinds, base, strict=True))


def scaled(costs: Sequence[Cost], kinds: Sequence[int], base: Sequence[int]) -> Cost:
    """The cost of ``kinds`` blocks from those of :func:`with_one_more`."""
    kernels = Counter(costs[0].kernels)
    for other, blocks, have in zip(costs[1:], kinds, base, strict=True):
        for kernel, often in other.kernels.items():
            kernels[kernel] += (blocks - have) * (often - costs[0].kernels[kernel])
    peak, kept = (scaled_number([getattr(cost, name) for cost in costs], kinds, base) for name in ("peak", "kept"))
    return Cost(+kernels, peak, kept)
