"""The value and its gradient at real geometry: eager PyTorch, torch.compile, and the fused blocks.

    python benchmarks/bench_value_gradient.py

SD3.5-M's first blocks, the stitch and a whole ViT, with random weights. All compute ``V`` and ``dV/dz`` of the same
latents, in turns. ``eager`` and ``compile`` are diffusers' and open_clip's own blocks with frozen weights, the resample
before the projection. Writes results/value_gradient.json.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from stitchvm_ext.backbones import expand_rows
from stitchvm_ext.bench.harness import alternate, bytes_kept, save, speedups
from stitchvm_ext.bench.models import stitched_value
from stitchvm_ext.bench.shapes import BACKBONES, TOWERS
from stitchvm_ext.measure import peak_memory
from stitchvm_ext.value import StitchedValue


class PlainValue(torch.nn.Module):
    """The same value from the libraries' own blocks."""

    def __init__(self, value: StitchedValue):
        super().__init__()
        transformer = value.backbone.denoiser
        self.embed, self.time = transformer.pos_embed, transformer.time_text_embed
        self.text = transformer.context_embedder
        self.blocks = transformer.transformer_blocks[: value.depth]
        self.stitch, self.suffix, self.grid = value.stitch, value.suffix, value.grid
        self.null = value.null_condition

    def forward(self, latents: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        null = expand_rows(self.null, latents.shape[0])
        tokens, text = self.embed(latents), self.text(null["prompt_embeds"])
        temb = self.time(1000 * sigma, null["pooled_prompt_embeds"])
        for block in self.blocks:
            text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=temb)
        image = tokens.unflatten(1, self.grid).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=self.stitch.out_grid, mode="bilinear", align_corners=False)
        y = self.stitch.project(image.flatten(2).transpose(1, 2))
        y = y + self.stitch.mlp(y)
        visual = self.suffix.visual
        prefix = visual.class_embedding.expand(y.shape[0], 1, -1)
        tokens = visual.ln_pre(torch.cat([prefix, y], dim=1) + visual.positional_embedding)
        for block in self.suffix.blocks:
            tokens = block(tokens)
        return self.suffix.score(self.suffix.finish(tokens), condition)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=[n for n in BACKBONES if n.startswith("sd3")], default="sd3.5-medium")
    parser.add_argument("--tower", choices=list(TOWERS), default="vit-l-14-336")
    parser.add_argument("--depth", type=int, default=4, help="i: blocks kept")
    parser.add_argument(
        "--side", type=int, default=32, help="image tokens are side x side: 32 is 512 pixels, 64 is 1024"
    )
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--memory-only", action="store_true", help="count what is kept for the backward, time nothing")
    parser.add_argument("--name", default="value_gradient", help="of the result")
    args = parser.parse_args()
    rows = [measure(args, getattr(torch, dtype)) for dtype in args.dtypes]
    print(f"wrote {save(args.name, {'settings': vars(args), 'rows': rows})}")


def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    torch.compiler.reset()
    value = stitched_value(
        args.backbone, args.tower, depth=args.depth, side=args.side, dtype=dtype, device=args.device
    )  # fmt: skip
    plain = PlainValue(value)
    g = torch.Generator(args.device).manual_seed(4)
    latents = torch.randn(1, 16, 2 * args.side, 2 * args.side, generator=g, device=args.device).to(dtype)
    condition = F.normalize(torch.randn(1, TOWERS[args.tower].embed, generator=g, device=args.device), dim=-1)
    sigma = torch.full((1,), 0.6, device=args.device)

    def fused(memory: str):
        def run(z: Tensor) -> Tensor:
            value.memory = memory
            return value.suffix.score(value(value.tokens(z, sigma), pooled_only=True), condition)

        return run

    forwards = {
        "fused": fused("save"),
        "fused, recompute": fused("recompute"),
        "eager": lambda z: plain(z, sigma, condition),
    }
    row = {"dtype": str(dtype).removeprefix("torch.")}
    weights = [*value.parameters(), *value.backbone.denoiser.parameters()]
    leaf = latents.clone().requires_grad_()
    row["bytes_kept"] = {name: bytes_kept(lambda f=f: f(leaf), weights) for name, f in forwards.items()}
    row["kept_share"] = {name: n / row["bytes_kept"]["eager"] for name, n in row["bytes_kept"].items()}
    print(row["dtype"], "kept for the backward:", describe_bytes(row), flush=True)
    if args.memory_only:
        return row

    if not args.no_compile:
        compiled = torch.compile(plain)
        forwards["compile"] = lambda z: compiled(z, sigma, condition)

    def gradient(forward):
        def run():
            z = latents.clone().requires_grad_()
            v = forward(z)
            return v.detach(), torch.autograd.grad(v.sum(), z)[0]

        return run

    calls = {name: gradient(forward) for name, forward in forwards.items()}
    row["products_share"] = products_share(calls["eager"])
    print(f"matrix products and attention take {row['products_share']:.0%} of eager's time", flush=True)
    row["error"] = errors(calls, dtype)
    row |= alternate(calls, seconds=0, rounds=args.rounds, warmup=1, device=args.device)
    row["speedup"] = speedups({name: row[name] for name in calls}, "fused")
    row["peak_bytes"] = {}
    for name, call in calls.items():
        with peak_memory(args.device) as peak:
            call()
        row["peak_bytes"][name] = peak.bytes
    for name in calls:
        ratio = f"{row['speedup'][name]:5.2f}x of fused" if name in row["speedup"] else ""
        peak = row["peak_bytes"][name] / 2**20
        print(
            f"{row['dtype']:<9}{name:<18}{row[name]['median_ms']:10.0f} ms  peak {peak:7.0f} MiB  "
            f"gradient off {row['error'][name]:.1e}  {ratio}",
            flush=True,
        )
    return row


def products_share(call) -> float:
    """The share of a call's time that matrix products and attention take: what fusing the rest cannot touch."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.cuda.is_available()
    call()  # the first one makes what later ones find
    with torch.profiler.profile(activities=kinds + [torch.profiler.ProfilerActivity.CUDA] * on_gpu) as profile:
        call()
    time_of = lambda e: e.self_device_time_total if on_gpu else e.self_cpu_time_total  # noqa: E731
    events = [e for e in profile.key_averages() if e.key.startswith("aten::")]
    products = ("mm", "conv", "scaled_dot_product", "flash", "efficient_attention", "cudnn_attention")
    return sum(time_of(e) for e in events if any(p in e.key for p in products)) / sum(time_of(e) for e in events)


def errors(calls: dict, dtype: torch.dtype) -> dict[str, float]:
    """Relative L2 distance of each gradient from eager's."""
    gradients = {name: call()[1].double() for name, call in calls.items()}
    expected = gradients["eager"]
    return {name: ((g - expected).norm() / expected.norm()).item() for name, g in gradients.items()}


def describe_bytes(row: dict) -> str:
    return ", ".join(
        f"{name} {n / 2**20:.0f} MiB ({row['kept_share'][name]:.2f})" for name, n in row["bytes_kept"].items()
    )


if __name__ == "__main__":
    main()
