"""Times the fused ops against eager PyTorch and torch.compile on this machine, and writes the ratios as JSON.

    python benchmarks/ops.py

Every case alternates between the implementations, so that noise from other work on the machine meets all of them;
figures are medians with the 20th and 80th percentile. `speedup` is the other implementation's median over the kernel's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from harness import save
from torch import Tensor

from stitchvm_ext import ops


def eager_adaln(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The form in diffusers' transformer blocks."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def eager_gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """The form in diffusers' transformer blocks."""
    residual = x + gate[:, None] * branch
    return residual, eager_adaln(residual, scale, shift)


def eager_resample(x: Tensor, grid: tuple[int, int], out_grid: tuple[int, int]) -> Tensor:
    """Tokens to image, F.interpolate, image to contiguous tokens."""
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=out_grid, mode="bilinear", align_corners=False, antialias=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def cases(device: str, dtype: torch.dtype) -> dict[str, tuple]:
    """name -> (fused, eager, arguments); the first argument is the one that is differentiated."""
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    table = {}
    for b, n, c in ((2, 4096, 1536), (2, 256, 384)):
        x, branch, gate, scale, shift = randn(b, n, c), randn(b, n, c), randn(b, c), randn(b, c), randn(b, c)
        table[f"adaln [{b}, {n}, {c}]"] = (ops.adaln, eager_adaln, (x, scale, shift))
        args = (x, branch, gate, scale, shift)
        table[f"gated_residual_adaln [{b}, {n}, {c}]"] = (ops.gated_residual_adaln, eager_gated_residual_adaln, args)
    for b, grid, out, c in ((2, (64, 64), (24, 24), 1536), (2, (64, 64), (16, 16), 1536), (2, (16, 16), (7, 7), 384)):
        name = f"resample_tokens [{b}, {grid[0]}x{grid[1]}, {c}] -> {out[0]}x{out[1]}"
        table[name] = (ops.resample_tokens, eager_resample, (randn(b, grid[0] * grid[1], c), grid, out))
    return table


def runner(f, args: tuple, backward: bool):
    """A call of f, or of f and its gradient for the first argument."""
    if not backward:

        def call() -> None:
            with torch.no_grad():
                f(*args)

        return call
    x = args[0].detach().requires_grad_()
    results = f(x, *args[1:])
    grad = tuple(map(torch.ones_like, results)) if isinstance(results, tuple) else torch.ones_like(results)

    def call() -> None:
        torch.autograd.grad(f(x, *args[1:]), x, grad)

    return call


def alternate(calls: dict, seconds: float, device: str) -> dict[str, dict[str, float]]:
    """Milliseconds per call of each entry, taken in turns until the time is used up (at least 5 rounds)."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    summary = {}
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=5)
        summary[name] = {"median_ms": statistics.median(values), "p20_ms": low, "p80_ms": high, "rounds": len(values)}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to time (CPU)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()

    rows = []
    for threads in args.threads if args.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for dtype in args.dtypes:
            for name, (fused, eager, inputs) in cases(args.device, getattr(torch, dtype)).items():
                for backward in (False, True):
                    torch.compiler.reset()
                    calls = {"kernel": runner(fused, inputs, backward), "eager": runner(eager, inputs, backward)}
                    if not args.no_compile:
                        calls["compile"] = runner(torch.compile(eager), inputs, backward)
                    row = {"case": name, "dtype": dtype, "threads": threads, "pass": "fwd+bwd" if backward else "fwd"}
                    row |= alternate(calls, args.seconds, args.device)
                    row["speedup"] = {
                        other: row[other]["median_ms"] / row["kernel"]["median_ms"]
                        for other in calls
                        if other != "kernel"
                    }
                    rows.append(row)
                    ratios = "  ".join(f"{value:5.2f}x vs {other}" for other, value in row["speedup"].items())
                    print(
                        f"{name:<44} {dtype:<9} {threads} thr {row['pass']:<8}"
                        f"{row['kernel']['median_ms']:9.3f} ms  {ratios}",
                        flush=True,
                    )

    info = ops.info()
    for library in info["libraries"].values():
        library.pop("path")  # the result is committed; a path of this machine means nothing elsewhere
    print(f"wrote {save('ops' if args.device == 'cpu' else 'ops_cuda', {'info': info, 'rows': rows})}")


if __name__ == "__main__":
    main()
