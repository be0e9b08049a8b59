"""What does the closed-form search cost, against ``torch.linalg.lstsq`` per pair?

All blocks of a denoiser against the first four layers of an image tower, on made-up features and tokens of the real
shapes on the reward's grid: the networks themselves run for both methods alike and are left out. Ours runs over the
whole grid. The baseline fits one pair on the same images: float64, centred the same way, all fitted rows at once, once
per driver. It takes turns with ours, and its time for the grid is its median per pair times the pairs. Seconds are the
process's own on one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..measure import peak_memory
from ..value.least_squares import LeastSquares, PositionSums
from .harness import save

LAYERS = 4
BATCH = 16
DRIVERS = ("gels", "gelsy", "gelsd")  # QR; pivoted QR, torch's default; singular values, the pseudo-inverse


class Features:
    """Batches of features and tokens, the same at every call: outlier channels, means, condition number near 1e4."""

    def __init__(self, width: int, out: int, positions: int):
        self.width, self.out, self.positions = width, out, positions
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        self.mix = torch.logspace(0, -3, width)[:, None] * basis
        self.mix[:, :8] *= 20
        self.mean = torch.randn(positions, width, generator=generator)
        self.map = torch.randn(width, LAYERS * out, generator=generator) / width**0.5

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Features [B, P, C] of depth 0, and tokens [B, P, J·C'] of all layers, partly a linear map of them."""
        images = [torch.Generator().manual_seed(1 + image) for image in range(start, stop)]
        x = torch.stack([torch.randn(self.positions, self.width, generator=g) for g in images])
        noise = torch.stack([torch.randn(self.positions, LAYERS * self.out, generator=g) for g in images])
        return x @ self.mix + self.mean, noise.add_(x @ self.map)

    def at(self, depth: int, features: Tensor) -> Tensor:
        """Features of a depth: those of depth 0 with the channels in another order and an own scale."""
        return features.roll(61 * depth, dims=2).mul_(1 + depth)


@contextmanager
def clock(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    times[name] = times.get(name, 0.0) + time.process_time() - start


def streaming(data: Features, images: int, fit: int, depths: int) -> tuple[dict[str, float], list[list[float]]]:
    """Seconds by part, and the mean squared error of every pair, as ``search_stitch`` finds them."""
    times: dict[str, float] = {}
    sums, targets = [LeastSquares() for _ in range(depths)], PositionSums()
    for start in range(0, fit, BATCH):
        features, tokens = data.batch(start, min(start + BATCH, fit))
        with clock(times, "sums"):
            shifted = targets.add(tokens)
        for depth, one in enumerate(sums):
            f = data.at(depth, features)
            with clock(times, "sums"):
                one.add(f, shifted)
    fits = []
    with clock(times, "solve"):
        while sums:
            fits.append(sums.pop(0).solve(targets, slice(data.out, None)))
    errors = [0.0] * depths
    for start in range(fit, images, BATCH):
        features, tokens = data.batch(start, min(start + BATCH, images))
        for depth, one in enumerate(fits):
            f = data.at(depth, features)
            with clock(times, "held out"):
                errors[depth] = errors[depth] + one.squared_error(f, tokens, LAYERS)
    times["total"] = sum(times.values())
    return times, [(e / ((images - fit) * data.positions * data.out)).tolist() for e in errors]


def gather(data: Features, images: int, depth: int, layer: int) -> tuple[Tensor, Tensor]:
    """Features and tokens of one pair for all images at once, float32."""
    features = torch.empty(images, data.positions, data.width)
    tokens = torch.empty(images, data.positions, data.out)
    for start in range(0, images, BATCH):
        stop = min(start + BATCH, images)
        f, g = data.batch(start, stop)
        features[start:stop] = data.at(depth, f)
        tokens[start:stop] = g[..., (layer - 1) * data.out : layer * data.out]
    return features, tokens


def per_pair(features: Tensor, tokens: Tensor, fit: int, layer: int, driver: str) -> tuple[float, float]:
    """Seconds and mean squared error of one pair by ``lstsq``."""
    start = time.process_time()
    axes = (0, 1) if layer == 1 else (0,)
    f, g = features[:fit].double(), tokens[:fit].double()
    mean_f, mean_g = f.mean(axes, keepdim=True), g.mean(axes, keepdim=True)
    f, g = f.sub_(mean_f).flatten(0, 1), g.sub_(mean_g).flatten(0, 1)
    w = torch.linalg.lstsq(f, g, driver=driver, **({} if driver == "gels" else {"rcond": 1e-5})).solution
    del f, g
    error = (features[fit:].double() - mean_f).flatten(0, 1) @ w
    error = error.sub_((tokens[fit:].double() - mean_g).flatten(0, 1)).square_().mean().item()
    return time.process_time() - start, error


def whole_grid(data: Features, images: int, fit: int, depths: int, rounds: int) -> dict:
    """Ours in full, ``rounds`` times, between rounds of single pairs."""
    ours, pairs, peaks, disagreement = [], {d: [] for d in DRIVERS}, [], 0.0
    found = None
    for turn in range(rounds + 1):
        if turn:
            with peak_memory() as memory:
                times, found = streaming(data, images, fit, depths)
            ours.append(times)
            peaks.append(memory.bytes)
            print(f"  ours {times['total']:.1f} s, {memory.bytes / 2**30:.2f} GiB", flush=True)
        depth, layer = turn * (depths - 1) // rounds, 1 + turn % LAYERS
        features, tokens = gather(data, images, depth, layer)
        for driver in DRIVERS:
            seconds, error = per_pair(features, tokens, fit, layer, driver)
            pairs[driver].append((seconds, depth, layer, error))
            print(f"  {driver} ({depth}, {layer}) {seconds:.1f} s", flush=True)
    for results in pairs.values():
        for _, depth, layer, error in results:
            disagreement = max(disagreement, abs(found[depth][layer - 1] / error - 1))
    total = statistics.median(t["total"] for t in ours)
    medians = {driver: statistics.median(r[0] for r in results) for driver, results in pairs.items()}
    return {
        "images": images,
        "fitted_images": fit,
        "ours_s": {name: statistics.median(t[name] for t in ours) for name in ours[0]},
        "ours_rounds_s": [t["total"] for t in ours],
        "ours_peak_bytes": max(peaks),
        "pair_s": medians,
        "pair_rounds_s": {driver: [r[0] for r in results] for driver, results in pairs.items()},
        "grid_s": {driver: depths * LAYERS * s for driver, s in medians.items()},
        "speedup": {driver: depths * LAYERS * s / total for driver, s in medians.items()},
        "largest_relative_difference_of_mse": disagreement,
    }


def one_depth(data: Features, images: int, fit: int, drivers: tuple[str, ...]) -> dict:
    """One depth against all layers by ours, and one pair of it per driver: seconds and peak memory."""
    with peak_memory() as memory:
        times, _ = streaming(data, images, fit, 1)
    row = {"images": images, "fitted_images": fit, "ours_s": times, "ours_peak_bytes": memory.bytes, "pairs": {}}
    print(f"  {images} images: ours {times['total']:.1f} s, {memory.bytes / 2**30:.2f} GiB", flush=True)
    for driver in drivers:
        with peak_memory() as memory:  # the rows of all images are part of what lstsq needs
            features, tokens = gather(data, images, 0, 2)
            seconds, _ = per_pair(features, tokens, fit, 2, driver)
        speedup = LAYERS * seconds / times["total"]
        row["pairs"][driver] = {"s": seconds, "peak_bytes": memory.bytes, "speedup": speedup}
        print(f"  {driver} {seconds:.1f} s, {memory.bytes / 2**30:.2f} GiB, {speedup:.1f}x", flush=True)
    return row


SIZES = {  # width and blocks of the denoiser, width and positions of the tower, images, those of the single depth
    "playground": (128, 6, 128, 64, 64, 200),
    "quarter": (1536, 6, 1024, 576, 16, 32),
    "real": (1536, 24, 1024, 576, 64, 200),
}


def run(scale: str, name: str, *, out: Path, device: str, pixels: int | None, rounds: int) -> dict[str, Any]:
    """The whole grid, then one depth with more images. Raises ValueError for a GPU or a size in pixels."""
    if device != "cpu":
        raise ValueError(f"device: expected cpu, whose process time is measured, got {device!r}")
    if pixels is not None:
        raise ValueError(f"pixels: expected none, the features are made up on the reward's grid, got {pixels}")
    width, depths, out_width, positions, images, many = SIZES[scale]
    result = search(Features(width, out_width, positions), depths, images, many, rounds)
    save(name, {"scale": scale, **result}, out)
    print(f"wrote {name}.json into {out}")
    return result


def search(data: Features, depths: int, images: int, many: int, rounds: int) -> dict[str, Any]:
    """Figures of the whole grid at ``images`` and of one depth at ``images`` and at ``many``; a quarter held out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of several, the time that they wait for each other would count
    try:
        print(f"{depths} depths x {LAYERS} layers, {images} images", flush=True)
        grid = whole_grid(data, images, images * 3 // 4, depths, rounds)
        few = one_depth(data, images, images * 3 // 4, ())
        more = one_depth(data, many, many * 3 // 4, ("gels", "gelsd"))
    finally:
        torch.set_num_threads(threads)
    print({name: f"{x:.1f}x" for name, x in grid["speedup"].items()})
    return {"depths": depths, "layers": LAYERS, "whole_grid": grid, "one_depth": [few, more]}
