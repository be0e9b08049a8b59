"""Which cards are large enough, and what has to be switched on for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .devices import GIB
from .scenarios import Scenario

CARDS = (12, 16, 24, 48, 80)
CONTEXT = 0.8e9  # bytes that CUDA's context and its libraries' workspaces take
FRAGMENTATION = 1.1  # of activations: what the caching allocator holds beyond what is alive


@dataclass(frozen=True)
class Fit:
    """How one way of working fits on a card.

    Attributes:
        card: its memory, GB of 2**30 bytes.
        group: "plain", "tweedie" or "stitched".
        preset: the least that makes it fit; None if nothing does.
        bytes: what that preset needs, or what the smallest one would need.
    """

    card: int
    group: str
    preset: str | None
    bytes: int


@dataclass(frozen=True)
class Savings:
    """Bytes that can leave the GPU beside the denoiser's, the autoencoder's and the rewards' weights.

    Attributes:
        text_encoders: resident unless they are offloaded after the texts were encoded.
        released: AdaLN weights that a table replaces, less the table; 0 where that is not possible.
    """

    text_encoders: int
    released: int


def fits(scenarios: Sequence[Scenario], savings: Savings) -> list[Fit]:
    """For every card and group the first preset that fits, in order of what it costs in time."""
    found = []
    for group in dict.fromkeys(scenario.group for scenario in scenarios):
        offered = sorted((s for s in scenarios if s.group == group and s.offered), key=lambda s: s.cost.flops)
        presets = list(_presets(offered, savings))
        for card in CARDS:
            fitting = [(name, size) for name, size in presets if size <= card * GIB]
            name, size = fitting[0] if fitting else (None, min(size for _, size in presets))
            found.append(Fit(card, group, name, size))
    return found


def _presets(scenarios: Sequence[Scenario], savings: Savings) -> Iterator[tuple[str, int]]:
    """Names and needed bytes: first without offloading, then with, then with released AdaLN weights too."""
    ways = [("", savings.text_encoders), ("text encoders offloaded", 0)]
    if savings.released > 0:
        ways.append(("text encoders offloaded, AdaLN released", -savings.released))
    for way, change in ways:
        for scenario in scenarios:
            size = scenario.weights + change + FRAGMENTATION * scenario.activations + CONTEXT
            yield "; ".join(filter(None, (scenario.name, way))), int(size)
