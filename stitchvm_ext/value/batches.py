"""What the steps of stage 2 read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..backbones import Encoding, expand_sigma
from .distillation import centre_biased_sigmas
from .targets import DistillationTargets


@dataclass(frozen=True)
class StepData:
    """Images, noise levels and noise of one optimiser step. They follow from (seed, step) alone, so that a step is the
    same however many processes share it and whenever it is run.

    Attributes:
        index: the images, int64 [B]: a fresh permutation every epoch, the incomplete last batch dropped.
        sigma: noise levels [B].
        prompted: whether the backbone reads the images' own captions in this step.
    """

    seed: int
    step: int
    index: Tensor
    sigma: Tensor
    prompted: bool

    @classmethod
    def of(cls, seed: int, step: int, count: int, batch_size: int, prompt_share: float) -> StepData:
        """The data of a step over ``count`` images."""
        epoch, position = divmod(step, max(1, count // batch_size))
        order = _order(seed, epoch, count)
        index = torch.from_numpy(order[position * batch_size : (position + 1) * batch_size])
        generator = seeded_generator(seed, step)
        sigma = centre_biased_sigmas(len(index), generator)
        prompted = torch.rand((), generator=generator).item() < prompt_share
        return cls(seed, step, index, sigma, prompted)

    def noise(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Noise [R, *shape] of some rows of the step, each from a generator of its own."""
        draws = [torch.randn(tuple(shape), generator=seeded_generator(self.seed, self.step, r)) for r in rows.tolist()]
        return torch.stack(draws)

    def picks(self, rows: Tensor, count: int) -> Tensor:
        """Which of ``count`` each row of the step reads, int64 [R]."""
        draws = [torch.randint(count, (), generator=seeded_generator(self.seed, self.step, r)) for r in rows.tolist()]
        return torch.stack(draws)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def seeded_generator(*key: int) -> torch.Generator:
    """Of a key such as (seed, step, row): neighbouring keys have nothing in common."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


@dataclass(frozen=True)
class Batch:
    """What one pass reads, on the CPU: clean latents, each teacher's tokens and embeddings, noise, noise levels, and
    the encodings of the captions (None for the null text).
    """

    clean: Tensor
    wanted: list[tuple[Tensor, Tensor]]
    noise: Tensor
    sigma: Tensor
    encoding: Encoding | None


def read_batch(targets: DistillationTargets, data: StepData, rows: Tensor) -> Batch:
    """Some rows of a step."""
    index = data.index[rows]
    clean, wanted = targets.batch(index)
    encoding = targets.encodings(index) if data.prompted else None
    sigma, noise = data.sigma[rows], data.noise(rows, clean.shape[1:])
    visited = targets.states(index)
    if visited is not None:  # one of the latents on the way; the noise is what makes it of the end
        states, sigmas = visited
        picked = torch.arange(len(rows)), data.picks(rows, sigmas.shape[1])
        sigma = sigmas[picked]
        mix = expand_sigma(sigma, clean)
        noise = (states[picked] - (1 - mix) * clean) / mix
    return Batch(clean, wanted, noise, sigma, encoding)


def read_ahead(calls: Iterable[Callable[[], Batch]]) -> Iterator[Batch]:
    """The results of calls, in order; while one is used, a thread makes the next."""
    with ThreadPoolExecutor(1) as pool:
        running = None
        for call in calls:
            done, running = running, pool.submit(call)
            if done is not None:
                yield done.result()
        if running is not None:
            yield running.result()
