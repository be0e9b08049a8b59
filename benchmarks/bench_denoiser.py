"""A denoising forward pass of SD3.5, classifier-free guidance included: eager, torch.compile, fused.

    python benchmarks/bench_denoiser.py                   # 6 of SD3.5-M's 24 blocks at true width, 1024 tokens
    python benchmarks/bench_denoiser.py --blocks 24 --side 64 --device cuda

Random weights; on a GPU also in a CUDA graph. ``fused`` is ``fuse(transformer)``; ``fused, table`` reads its modulation
from ``precompute_conditioning`` besides. Writes results/denoiser.json.
"""

from __future__ import annotations

import argparse

import torch

from stitchvm_ext import fuse, precompute_conditioning, unfuse
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.bench.harness import alternate, save, speedups
from stitchvm_ext.bench.models import encoding, transformer
from stitchvm_ext.bench.shapes import BACKBONES
from stitchvm_ext.measure import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=[n for n in BACKBONES if n.startswith("sd3")], default="sd3.5-medium")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument(
        "--side", type=int, default=32, help="image tokens are side x side: 32 is 512 pixels, 64 is 1024"
    )
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    rows = [measure(args, getattr(torch, dtype)) for dtype in args.dtypes]
    print(
        f"wrote {save('denoiser' if args.device == 'cpu' else 'denoiser_cuda', {'settings': vars(args), 'rows': rows})}"
    )


@torch.no_grad()
def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    torch.compiler.reset()
    model = transformer(args.backbone, args.blocks - 1, args.side, dtype, args.device)
    backbone = backbone_of(model)
    g = torch.Generator(args.device).manual_seed(4)
    latents = torch.randn(1, 16, 2 * args.side, 2 * args.side, generator=g, device=args.device).to(dtype)
    both = {name: torch.cat([t, t + 0.1]) for name, t in encoding(1, dtype, args.device).items()}
    call = {**backbone.inputs(torch.cat([latents] * 2), torch.full((2,), 0.6, device=args.device), both)}
    plain = lambda: model(**call, return_dict=False)[0]  # noqa: E731

    def fused():
        fuse(model)
        try:
            return plain()
        finally:
            unfuse(model)

    def with_table():
        table.install()
        try:
            return fused()
        finally:
            table.remove()

    steps = torch.linspace(1, 0.02, 50)
    steps[20] = 0.6
    with precompute_conditioning(model, steps, both["pooled_prompt_embeds"]) as table:
        pass
    calls = {"fused": fused, "fused, table": with_table, "eager": plain}
    if args.device == "cuda":
        fuse(model, cuda_graph=True)
        graph = model.forward
        unfuse(model)
        calls["fused, CUDA graph"] = lambda: graph(**call, return_dict=False)[0]  # the first call captures

        def capture():
            fuse(model)
            try:
                calls["fused, CUDA graph"]()
            finally:
                unfuse(model)

        capture()
    if not args.no_compile:
        compiled = torch.compile(model, dynamic=False)
        calls["compile"] = lambda: compiled(**call, return_dict=False)[0]
    results = {name: f().double() for name, f in calls.items()}
    row = {"dtype": str(dtype).removeprefix("torch.")}
    row["error"] = {
        name: ((r - results["eager"]).norm() / results["eager"].norm()).item() for name, r in results.items()
    }
    row |= {"table_bytes": table.nbytes, "replaced_bytes": table.replaced_bytes}
    row |= alternate(calls, seconds=0, rounds=args.rounds, warmup=1, device=args.device)
    row["speedup"] = speedups({name: row[name] for name in calls}, "fused")
    row["peak_bytes"] = {}
    for name, f in calls.items():
        with peak_memory(args.device) as peak:
            f()
        row["peak_bytes"][name] = peak.bytes
        ratio = f"{row['speedup'][name]:5.2f}x of fused" if name in row["speedup"] else ""
        print(
            f"{row['dtype']:<9}{name:<18}{row[name]['median_ms']:10.1f} ms  peak {peak.bytes / 2**20:7.0f} MiB  "
            f"off {row['error'][name]:.1e}  {ratio}",
            flush=True,
        )
    print(f"tables {table.nbytes / 2**20:.1f} MiB in the place of {table.replaced_bytes / 2**20:.1f} MiB of weights")
    return row


if __name__ == "__main__":
    main()
