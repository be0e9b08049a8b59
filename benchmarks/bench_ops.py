"""The fused ops against eager PyTorch and torch.compile, at the shapes of real models.

    python benchmarks/bench_ops.py

Forward and backward of every memory-bound op. The implementations take turns, so that noise from other work on the
machine meets all of them; figures are medians with the 20th and 80th percentile. ``copy`` is ``x.clone()`` of a tensor
that moves as many bytes as the op has to: its time over the kernel's is the share of the bandwidth limit. Errors are
relative to float64. Writes results/ops.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

from stitchvm_ext import ops
from stitchvm_ext.bench.harness import alternate, save, speedups
from stitchvm_ext.bench.shapes import BACKBONES, TOWERS


@dataclass
class Case:
    """``fused`` and ``eager`` take the same tensors and return a tensor or a tuple of tensors."""

    name: str
    fused: Callable
    eager: Callable
    inputs: tuple[Tensor, ...]
    differentiate: int = 1  # how many inputs, from the first on, have a gradient; 0: forward only
    backward_bytes: int = 0  # what the backward has to read and write


def tuple_of(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


# -- eager forms, as diffusers and open_clip write them ----------------------------------------------------------------


def eager_adaln(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def eager_adaln_twice(x, scale, shift, scale2, shift2):
    n = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return n * (1 + scale[:, None]) + shift[:, None], n * (1 + scale2[:, None]) + shift2[:, None]


def eager_gated_residual(x, branch, gate):
    return x + gate.unsqueeze(1) * branch


def eager_gated_residual_adaln(x, branch, gate, scale, shift):
    x = x + gate.unsqueeze(1) * branch
    return x, eager_adaln(x, scale, shift)


def eager_two_branches(x, branch, branch2, gate, gate2, scale, shift):
    x = x + gate.unsqueeze(1) * branch
    x = x + gate2.unsqueeze(1) * branch2
    return x, eager_adaln(x, scale, shift)


def eager_layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def eager_residual_layer_norm(x, branch, weight, bias):
    x = x + branch
    return x, eager_layer_norm(x, weight, bias)


def eager_rms_norm(x, weight):
    normed = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.to(weight.dtype) * weight


def eager_rotary(x, cos, sin):
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def eager_qk_norm(heads: int, context_first: bool):
    def run(q, k, v, cq, ck, cv, wq, wk, cwq, cwk, *rotary):
        q, k, v, cq, ck, cv = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v, cq, ck, cv))
        q, k = eager_rms_norm(q, wq), eager_rms_norm(k, wk)
        cq, ck = eager_rms_norm(cq, cwq), eager_rms_norm(ck, cwk)
        pairs = ((cq, q), (ck, k), (cv, v)) if context_first else ((q, cq), (k, ck), (v, cv))
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        if rotary:
            q, k = eager_rotary(q, *rotary), eager_rotary(k, *rotary)
        return q, k, v

    return run


def fused_qk_norm(heads: int, context_first: bool):
    def run(q, k, v, cq, ck, cv, wq, wk, cwq, cwk, *rotary):
        out = ops.qk_norm(
            q, k, v, heads=heads, q_weight=wq, k_weight=wk, context=(cq, ck, cv), context_q_weight=cwq,
            context_k_weight=cwk, rotary=rotary or None, context_first=context_first,
        )  # fmt: skip
        return tuple(t.transpose(1, 2) for t in out[:3])

    return run


def eager_resample(grid, out_grid):
    def run(x):
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=out_grid, mode="bilinear", align_corners=False, antialias=False)
        return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()

    return run


def eager_enter(x, residual, prefix, position):
    return torch.cat([prefix.expand(x.shape[0], -1, -1), residual + x], dim=1) + position


def eager_guidance_step(latents, cond, uncond, grad, noise):
    """CFG, relative value guidance, one SDE step."""
    u = (uncond + 4.5 * (cond - uncond)).float()
    norm = lambda t: t.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # noqa: E731
    u = u - 0.2 * norm(u) / norm(grad) * grad
    return 0.98 * latents - 0.04 * u + 0.1 * noise


# -- cases -------------------------------------------------------------------------------------------------------------


def backbone_cases(name: str, tokens: int, randn: Callable) -> list[Case]:
    shape = BACKBONES[name]
    c, heads, text = shape.width, shape.heads, shape.text
    at = f"{name} [1, {tokens}, {c}]"
    x, branch, branch2 = (randn(1, tokens, c) for _ in range(3))
    gate, gate2, scale, shift, scale2, shift2 = randn(1, 6 * c).chunk(6, 1)
    n = x.nbytes
    cases = [
        Case(f"adaln {at}", ops.adaln, eager_adaln, (x, scale, shift), 1, 3 * n),
        Case(f"adaln, two modulations {at}", ops.adaln, eager_adaln_twice, (x, scale, shift, scale2, shift2), 1, 4 * n),
        Case(f"gated_residual {at}", ops.gated_residual, eager_gated_residual, (x, branch, gate), 2, 2 * n),
        Case(
            f"gated_residual_adaln {at}", ops.gated_residual_adaln, eager_gated_residual_adaln,
            (x, branch, gate, scale, shift), 2, 5 * n,
        ),
        Case(
            f"gated_residual_adaln, two branches {at}",
            lambda x, b, b2, g, g2, sc, sh: ops.gated_residual_adaln(x, b, g, sc, sh, branch2=b2, gate2=g2),
            eager_two_branches, (x, branch, branch2, gate, gate2, scale, shift), 3, 6 * n,
        ),
    ]  # fmt: skip
    pre, bias = randn(1, tokens, 4 * c), torch.zeros_like(randn(4 * c))
    eager_gelu = lambda x, b: F.gelu(x + b, approximate="tanh")  # noqa: E731
    cases.append(
        Case(f"gelu_tanh with bias {name} [1, {tokens}, {4 * c}]", ops.gelu_tanh, eager_gelu, (pre, bias), 1, 12 * n)
    )
    eager_gelu = lambda x: F.gelu(x, approximate="tanh")  # noqa: E731
    cases.append(Case(f"gelu_tanh {name} [1, {tokens}, {4 * c}]", ops.gelu_tanh, eager_gelu, (pre,), 1, 12 * n))
    raw = tuple(randn(1, tokens, c) for _ in range(3)) + tuple(randn(1, text, c) for _ in range(3))
    weights = tuple(1 + 0.1 * randn(c // heads) for _ in range(4))
    rotary = ()
    if shape.rotary:
        angle = torch.randn(tokens + text, c // heads, device=x.device)
        rotary = (angle.cos(), angle.sin())
    joint = nbytes(*raw)
    cases.append(
        Case(
            f"qk_norm{' with rotary' if rotary else ''} {name} [1, {tokens} + {text}, {c}]",
            fused_qk_norm(heads, shape.rotary), eager_qk_norm(heads, shape.rotary),
            (*raw, *weights, *rotary), 6, 2 * joint + 2 * joint // 3,
        )
    )  # fmt: skip
    return cases


def stitch_cases(backbone: str, name: str, side: int, randn: Callable) -> list[Case]:
    width, tower = BACKBONES[backbone].width, TOWERS[name]
    c, patches = tower.width, tower.side**2
    x, residual = randn(1, side * side, width), randn(1, patches, c)
    grid, out = (side, side), (tower.side, tower.side)
    tokens, mlp = randn(1, patches + 1, c), randn(1, patches + 1, int(tower.mlp_ratio) * c)
    weight, bias = randn(c), randn(c)
    act = ops.quick_gelu if tower.quick_gelu else ops.gelu
    eager_act = (lambda x: x * torch.sigmoid(1.702 * x)) if tower.quick_gelu else F.gelu
    bottleneck = randn(1, patches, c // 8)
    return [
        Case(
            f"resample_tokens {backbone} {side}x{side} -> {name} {tower.side}x{tower.side}",
            lambda x: ops.resample_tokens(x, grid, out), eager_resample(grid, out), (x,), 1,
            x.nbytes + patches * width * x.element_size(),
        ),
        Case(
            f"resample_tokens, class token, position, residual {name} [1, {patches}, {c}]",
            lambda x, r, p, pos: ops.resample_tokens(x, out, out, prefix=p, position=pos, residual=r), eager_enter,
            (randn(1, patches, c), residual, randn(1, c), randn(patches + 1, c)), 2, 3 * residual.nbytes,
        ),
        Case(f"silu {name} [1, {patches}, {c // 8}]", ops.silu, F.silu, (bottleneck,), 1, 3 * bottleneck.nbytes),
        Case(
            f"layer_norm {name} [1, {patches + 1}, {c}]", lambda x, w, b: ops.layer_norm(x, w, b, eps=1e-5),
            eager_layer_norm, (tokens, weight, bias), 1, 3 * tokens.nbytes,
        ),
        Case(
            f"layer_norm after residual {name} [1, {patches + 1}, {c}]",
            lambda x, r, w, b: ops.layer_norm(x, w, b, residual=r, eps=1e-5), eager_residual_layer_norm,
            (tokens, tokens.flip(1).contiguous(), weight, bias), 2, 4 * tokens.nbytes,
        ),
        Case(f"{act.__name__} {name} [1, {patches + 1}, {mlp.shape[-1]}]", act, eager_act, (mlp,), 1, 3 * mlp.nbytes),
    ]  # fmt: skip


def sampling_case(side: int, randn: Callable) -> Case:
    shape = (2, 16, 2 * side, 2 * side)
    latents, grad, noise = (randn(*shape).float() for _ in range(3))
    cond, uncond = randn(*shape), randn(*shape)
    coefficients = {"guidance_scale": 4.5, "strength": 0.2, "relative": True}
    coefficients |= {"latents_coef": 0.98, "velocity_coef": -0.04, "noise_coef": 0.1}
    return Case(
        f"guidance_step {list(shape)}",
        lambda z, c, u, g, n: ops.guidance_step(z, c, uncond=u, grad=g, noise=n, **coefficients)[0],
        eager_guidance_step, (latents, cond, uncond, grad, noise), 0,
    )  # fmt: skip


def all_cases(args: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    g = torch.Generator(args.device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=args.device).to(dtype)

    cases = [case for name in args.backbones for case in backbone_cases(name, args.side**2, randn)]
    cases += [case for name in TOWERS for case in stitch_cases(args.backbones[0], name, 64, randn)]
    cases.append(sampling_case(args.side, randn))
    return [case for case in cases if args.only in case.name]


# -- measuring ---------------------------------------------------------------------------------------------------------


def forward_call(f: Callable, case: Case) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            f(*case.inputs)

    return call


def backward_call(f: Callable, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """The backward alone, of a graph that is made once."""
    leaves = [t.detach().requires_grad_() for t in case.inputs[: case.differentiate]]
    outputs = tuple_of(f(*leaves, *case.inputs[case.differentiate :]))
    grads = [torch.ones_like(o) * 0.5 for o in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def error(call: Callable, exact: tuple[Tensor, ...]) -> float:
    """Largest relative L2 error of the outputs."""
    got = tuple_of(call())
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))


def measure(case: Case, args: argparse.Namespace, dtype: torch.dtype, threads: int) -> list[dict]:
    rows = []
    torch.compiler.reset()
    implementations = {"kernel": case.fused, "eager": case.eager}
    if not args.no_compile:
        implementations["compile"] = torch.compile(case.eager, dynamic=False)
    doubled = Case(case.name, case.fused, case.eager, tuple(t.double() for t in case.inputs), case.differentiate)
    for which in ("fwd", "bwd") if case.differentiate else ("fwd",):
        with torch.no_grad():
            exact = tuple_of(case.eager(*doubled.inputs))
        moved = nbytes(*case.inputs) + sum(t.numel() for t in exact) * case.inputs[0].element_size()
        if which == "bwd":
            moved = case.backward_bytes
            exact = backward_call(case.eager, doubled)()
            calls = {name: backward_call(f, case) for name, f in implementations.items()}
            errors = {name: error(call, exact) for name, call in calls.items()}
        else:
            calls = {name: forward_call(f, case) for name, f in implementations.items()}
            errors = {name: error(lambda f=f: f(*case.inputs), exact) for name, f in implementations.items()}
        buffer = torch.empty(moved // 8, device=args.device)  # read once and written once: `moved` bytes
        calls["copy"] = buffer.clone
        times = alternate(calls, seconds=args.seconds, device=args.device)
        row = {
            "case": case.name, "dtype": str(dtype).removeprefix("torch."), "threads": threads, "pass": which,
            "bytes": moved, **times, "error": errors, "speedup": speedups(times, "kernel"),
        }  # fmt: skip
        row["bandwidth_share"] = row["speedup"].pop("copy")
        row["meets_the_bar"] = row["bandwidth_share"] >= 0.7 or (
            row["speedup"]["eager"] >= 2 and row["speedup"].get("compile", 9) >= 1.2
        )
        rows.append(row)
        ratios = "  ".join(f"{value:5.2f}x {other}" for other, value in row["speedup"].items())
        print(
            f"{case.name:<72} {row['dtype']:<9}{threads} thr {which}{times['kernel']['median_ms']:9.3f} ms  {ratios}  "
            f"{row['bandwidth_share']:5.0%} of copy  error {errors['kernel']:.0e} (eager {errors['eager']:.0e})"
            f"{'' if row['meets_the_bar'] else '  <- below the bar'}",
            flush=True,
        )
    return rows


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="thread counts to time (CPU)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=["sd3.5-medium"])
    parser.add_argument("--side", type=int, default=32, help="side x side image tokens; 64 is 1024 pixels")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each row")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--name", help='of the result; "ops" (on a GPU "ops_cuda") for all cases, none for some')
    return parser


def main() -> None:
    args = parser().parse_args()
    functorch_config.donated_buffer = False  # the backward of one graph is called many times
    rows = []
    for threads in args.threads if args.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for dtype in args.dtypes:
            for case in all_cases(args, getattr(torch, dtype)):
                rows += measure(case, args, getattr(torch, dtype), threads)
    met = sum(row["meets_the_bar"] for row in rows)
    print(f"{met} of {len(rows)} rows: 2x eager and 1.2x torch.compile, or 70% of the copy bandwidth")
    name = args.name or ("" if args.only else "ops" if args.device == "cpu" else "ops_cuda")
    if name:
        info = ops.info()
        for library in info["libraries"].values():
            library.pop("path")  # the result is committed; a path of this machine means nothing elsewhere
        print(f"wrote {save(name, {'settings': vars(args), 'info': info, 'rows': rows})}")


if __name__ == "__main__":
    main()
