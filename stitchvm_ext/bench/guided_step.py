"""What does one guided step cost, against plain sampling and against Tweedie-DPS?

Classifier-free guidance, one latent, one Euler step with the value's gradient. "plain" runs the denoiser alone;
"Tweedie-DPS" denoises, decodes, scores, and differentiates through all of it; the stitched ones add one thing after the
other: a prefix of the value's own, the prefix shared with the unconditional branch, fused blocks, and fewer kept
activations. All but the last two run on the libraries' own blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ..sampling.guidance import Guidance
from ..value import TweedieValue
from ..value.base import ValueEstimator
from .counting import counted
from .harness import alternate, save, summary
from .profiling import profile as profile_calls
from .scales import Setup, build

SIGMA, SIGMA_NEXT = 0.6, 0.55
PLAIN, TWEEDIE, PROBE = "plain", "Tweedie-DPS", "matrix product"
TARGETS = {"faster_than_tweedie": 2.8, "time_over_plain": 1.35, "peak_over_tweedie": 0.4}  # of stitched, on a CPU
Step = Callable[[], Tensor]


def run(scale: str, *, out: Path, device: str = "cpu", pixels: int | None = None, rounds: int = 5) -> dict[str, Any]:
    """Measure all variants in turns; writes guided_step_SCALE.json, from the second round on, and .png."""
    setup, name = build(scale, device, pixels), result_name(scale, device)
    calls, cost = variants(setup), {}
    for variant, call in calls.items():
        cost[variant] = counted(call, setup.weights(), device).as_dict()
        print(f"counted {variant}", flush=True)
    probe, probe_flops = matrix_product(device, setup.backbone.dtype)
    cost[PROBE] = {"flops": probe_flops}
    result: dict[str, Any] = {}

    def record(times: dict[str, list[float]]) -> None:
        rounds_done = len(times[PROBE])
        print(f"round {rounds_done}: " + ", ".join(f"{v} {t[-1] / 1e3:.4g} s" for v, t in times.items()), flush=True)
        if rounds_done > 1:
            result.update(summarise(setup, cost, times))
            save(name, result, out)

    alternate({**calls, PROBE: probe}, seconds=0, device=device, rounds=rounds, warmup=0, on_round=record)
    plot(result, out / f"{name}.png")
    print(f"\n{table(result)}\n\nwrote {name}.json and {name}.png into {out}")
    return result


def profile(scale: str, *, out: Path, device: str = "cpu", pixels: int | None = None) -> dict[str, dict[str, float]]:
    """Milliseconds of every variant by phase; writes guided_step_SCALE_phases.json and a trace per variant."""
    setup = build(scale, device, pixels)
    calls = variants(setup)
    if scale != "real":  # the first call of a process is slower, by more than such a step takes
        for call in calls.values():
            call()
    return profile_calls(calls, f"{result_name(scale, device)}_phases", out, device)


def result_name(scale: str, device: str) -> str:
    return f"guided_step_{scale}" + ("" if device == "cpu" else "_cuda")


def variants(setup: Setup) -> dict[str, Step]:
    """One whole step, by name: the next latents [1, C, h, w]."""
    value, backbone = setup.value, setup.backbone
    question = setup.latents, SIGMA, setup.condition
    tweedie = TweedieValue(setup.pipe, setup.reward)

    def plain() -> tuple:
        with torch.no_grad():
            return *backbone.branches(*question), None, None

    def stitched(memory: str, ask: Callable[..., tuple]) -> Callable[[], tuple]:
        def call():
            value.memory = memory
            return ask(*question)

        return call

    unshared = lambda *args: ValueEstimator.branches_with_value(value, *args)  # noqa: E731
    eager = {
        PLAIN: plain,
        TWEEDIE: lambda: tweedie.branches_with_value(*question),
        "stitched, own prefix": stitched("save", unshared),
        "stitched, shared": stitched("save", value.branches_with_value),
    }
    fused = {
        "stitched, shared, fused": stitched("save", value.branches_with_value),
        "stitched, shared, fused, recompute": stitched("recompute", value.branches_with_value),
    }

    def step(ask: Callable[[], tuple], unfused: bool) -> Step:
        def call():
            if not unfused:
                return _step(setup, *ask())
            with libraries_own_blocks():
                return _step(setup, *ask())

        return call

    return {name: step(ask, True) for name, ask in eager.items()} | {n: step(ask, False) for n, ask in fused.items()}


def _step(setup: Setup, cond: Tensor, uncond: Tensor | None, value: Tensor | None, grad: Tensor | None) -> Tensor:
    velocity = setup.condition.guide(cond, uncond).float()
    if grad is not None:
        velocity = velocity - Guidance().term(velocity, grad, SIGMA)
    return setup.latents + (SIGMA_NEXT - SIGMA) * velocity


@contextmanager
def libraries_own_blocks() -> Iterator[None]:
    """No block runs fused: what diffusers and open_clip themselves do."""
    with (
        patch("stitchvm_ext.fused.fused_forward.is_joint_block", lambda block: False),
        patch("stitchvm_ext.rewards.base.is_vit_block", lambda block, tokens: False),
    ):
        yield


def matrix_product(device: str, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A product that runs at the machine's limit, and its FLOPs."""
    side = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * side**3


def summarise(setup: Setup, cost: dict[str, dict[str, int]], times: dict[str, list[float]]) -> dict[str, Any]:
    """The result's file: by variant time, memory, FLOPs, share of the limit; ratios of the stitched ones."""
    rows = {}
    for variant, values in times.items():
        row = {**summary(values), **cost[variant]}
        rows[variant] = {**row, "tflops_per_s": row["flops"] / row["median_ms"] / 1e9}
    limit = rows[PROBE]["tflops_per_s"]
    for row in rows.values():
        row["share_of_limit"] = row["tflops_per_s"] / limit
    plain, tweedie = rows[PLAIN], rows[TWEEDIE]
    ratios = {
        variant: {
            "faster_than_tweedie": tweedie["median_ms"] / row["median_ms"],
            "time_over_plain": row["median_ms"] / plain["median_ms"],
            "peak_over_tweedie": row["peak_bytes"] / tweedie["peak_bytes"] if tweedie["peak_bytes"] else None,
            "flops_over_plain": row["flops"] / plain["flops"],
        }
        for variant, row in rows.items()
        if variant.startswith("stitched")
    }
    return {"setup": setup.description, "targets": TARGETS, "variants": rows, "stitched": ratios}


def table(result: dict[str, Any]) -> str:
    """One line per variant, and what the figures are of."""
    setup, rows = result["setup"], result["variants"]
    plain = rows[PLAIN]["median_ms"]
    lines = [
        ", ".join(f"{name} {value}" for name, value in setup.items()),
        f"{'':<36}{'s':>9}{'20-80%':>18}{'x plain':>9}{'TFLOP':>10}{'of limit':>10}{'peak MiB':>10}{'kept MiB':>10}",
    ]
    for name, row in rows.items():
        line = f"{name:<36}{row['median_ms'] / 1e3:9.4g}"
        line += f"{row['p20_ms'] / 1e3:9.4g}-{row['p80_ms'] / 1e3:<8.4g}{row['median_ms'] / plain:9.2f}"
        line += f"{row['flops'] / 1e12:10.3g}{row['share_of_limit']:10.0%}"
        if name != PROBE:
            line += f"{row['peak_bytes'] / 2**20:10.0f}{row['kept_bytes'] / 2**20:10.0f}"
        lines.append(line)
    for name, ratio in result["stitched"].items():
        peak = "" if ratio["peak_over_tweedie"] is None else f", {ratio['peak_over_tweedie']:.2f} of its peak"
        lines.append(f"{name}: {ratio['faster_than_tweedie']:.2f}x faster than {TWEEDIE}{peak}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds with their spread, and peak memory, by variant."""
    from matplotlib.figure import Figure

    rows = {name: row for name, row in result["variants"].items() if name != PROBE}
    names, places = list(rows), range(len(rows))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    median = [row["median_ms"] / 1e3 for row in rows.values()]
    below = [(row["median_ms"] - row["p20_ms"]) / 1e3 for row in rows.values()]
    above = [(row["p80_ms"] - row["median_ms"]) / 1e3 for row in rows.values()]
    time.barh(places, median, xerr=[below, above], color="tab:blue")
    memory.barh(places, [row["peak_bytes"] / 2**30 for row in rows.values()], color="tab:orange")
    time.set(title="seconds per step", yticks=places, yticklabels=names)
    time.invert_yaxis()
    memory.set(title="peak memory above the weights, GiB")
    setup = result["setup"]
    figure.suptitle(f"{setup['scale']}, {setup['pixels']} pixels, {setup['dtype']}, weights {setup['weights']}", size=9)
    figure.savefig(path, dpi=140)
