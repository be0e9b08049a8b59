"""Per-sample randomness, so that a sample does not depend on the samples beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """The random numbers of S samples, each from a generator of its own, however many particles a sample has.

    They are drawn where the generator lives: a CPU generator's are the same on every device.

    Args:
        generators: S of them.
        device: where the numbers are wanted.
    """

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device):
        self.generators, self.device = list(generators), device

    def __len__(self) -> int:
        return len(self.generators)

    def rows(self, index) -> Noise:
        """That of some samples; ``index`` is a slice or a list of positions."""
        chosen = self.generators[index] if isinstance(index, slice) else [self.generators[k] for k in index]
        return Noise(chosen, self.device)

    def normal(self, shape: tuple[int, ...], particles: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal noise [S * particles, *shape]; the particles of a sample stand next to each other, the first
        one gets what it would get alone.
        """
        drawn = [
            torch.randn((1, *shape), generator=g, device=g.device, dtype=dtype).to(self.device)
            for g in self.generators
            for _ in range(particles)
        ]
        return torch.cat(drawn)

    def uniform(self, count: int) -> Tensor:
        """Uniform numbers in [0, 1), float64 [S, count] on the CPU."""
        drawn = [torch.rand(count, generator=g, device=g.device, dtype=torch.float64).cpu() for g in self.generators]
        return torch.stack(drawn)


def per_sample_generators(
    generator: torch.Generator | list[torch.Generator] | None, count: int
) -> list[torch.Generator]:
    """One generator per sample.

    Args:
        generator: ``count`` generators, which are used as they are; or one, which the first sample uses as it is (so
            that one sample gets the noise that a diffusers pipeline would draw) and from which the others' seeds are
            drawn, on a copy; or None, for seeds from torch's global generator.

    Raises:
        TypeError: something else. ValueError: another number of generators, or one object twice.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))
    if isinstance(generator, torch.Generator):
        copy = torch.Generator(generator.device)
        copy.set_state(generator.get_state())
        seeds = torch.randint(2**62, (max(count - 1, 0),), generator=copy, device=copy.device).tolist()
        return [generator, *(torch.Generator(generator.device).manual_seed(seed) for seed in seeds)]
    if not isinstance(generator, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generator):
        raise TypeError(f"generator: expected a torch.Generator or a list of them, got {type(generator).__name__}")
    if len(generator) != count:
        raise ValueError(f"generator: expected one generator or {count}, one per sample, got {len(generator)}")
    if len({id(g) for g in generator}) != count:
        raise ValueError("generator: expected a different generator object for every sample, got one more than once")
    return list(generator)
