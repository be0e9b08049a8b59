"""Per-sample randomness, so that a sample does not depend on the samples beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSource:
    """One sample's generator, and the device on which its noise is wanted."""

    generator: torch.Generator
    device: torch.device

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal noise, drawn where the generator lives: a CPU generator's is the same on every device."""
        noise = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=dtype)
        return noise.to(self.device)


def draw_all(sources: list[NoiseSource], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise [B, *shape], a row from each source."""
    return torch.cat([source.draw((1, *shape), dtype) for source in sources])


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
