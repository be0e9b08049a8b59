"""How variants of one call are measured: counted once, then timed in turns, beside the machine's limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from .counting import counted
from .harness import alternate, save, summary
from .scales import Setup

PROBE = "matrix product"
Calls = dict[str, Callable[[], Any]]
Rows = dict[str, dict[str, float]]


def measure(
    setup: Setup,
    calls: Calls,
    name: str,
    *,
    out: Path,
    rounds: int,
    add: Callable[[Rows], dict[str, Any]] = lambda rows: {},
) -> dict[str, Any]:
    """Time, memory, FLOPs and share of the limit of every call; writes NAME.json after every round, NAME.png
    at the end, and prints the table.

    Args:
        add: further entries of the result, from the rows.
    """
    device, cost = setup.device, {}
    for variant, call in calls.items():
        cost[variant] = counted(call, setup.weights(), device).as_dict()
        print(f"counted {variant}", flush=True)
    probe, probe_flops = matrix_product(device, setup.backbone.dtype)
    cost[PROBE] = {"flops": probe_flops}
    result: dict[str, Any] = {}

    def record(times: dict[str, list[float]]) -> None:
        done = len(times[PROBE])
        print(f"round {done}: " + ", ".join(f"{v} {t[-1] / 1e3:.4g} s" for v, t in times.items()), flush=True)
        rows = rows_of(cost, times)
        result.update({"setup": setup.description, "variants": rows, **add(rows)})
        save(name, result, out)

    alternate({**calls, PROBE: probe}, seconds=0, device=device, rounds=rounds, warmup=0, on_round=record)
    plot(result, out / f"{name}.png")
    print(f"\n{table(result)}\n\nwrote {name}.json and {name}.png into {out}")
    return result


@contextmanager
def libraries_own_blocks() -> Iterator[None]:
    """No block runs fused: what diffusers and open_clip themselves do."""
    with (
        patch("stitchvm_ext.fused.fused_forward.is_joint_block", lambda block: False),
        patch("stitchvm_ext.rewards.base.is_vit_block", lambda block, tokens: False),
    ):
        yield


def unfused(call: Callable[[], Any]) -> Callable[[], Any]:
    def run():
        with libraries_own_blocks():
            return call()

    return run


def with_memory(setup: Setup, memory: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call at a memory level of the stitched value."""

    def run():
        setup.value.memory = memory
        return call()

    return run


def matrix_product(device: str, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A product that runs at the machine's limit, and its FLOPs."""
    side = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * side**3


def rows_of(cost: dict[str, dict[str, int]], times: dict[str, list[float]]) -> Rows:
    """By variant: milliseconds, what was counted, speed, and its share of the speed of the matrix product."""
    rows = {}
    for variant, values in times.items():
        row = {**summary(values), **cost[variant]}
        rows[variant] = {**row, "tflops_per_s": row["flops"] / row["median_ms"] / 1e9}
    limit = rows[PROBE]["tflops_per_s"]
    for row in rows.values():
        row["share_of_limit"] = row["tflops_per_s"] / limit
    return rows


def table(result: dict[str, Any]) -> str:
    """What the figures are of, and one line per variant; "x" is its time over the first one's."""
    setup, rows = result["setup"], result["variants"]
    first = next(iter(rows.values()))["median_ms"]
    lines = [
        ", ".join(f"{name} {value}" for name, value in setup.items()),
        f"{'':<36}{'s':>9}{'20-80%':>18}{'x':>9}{'TFLOP':>10}{'of limit':>10}{'peak MiB':>10}{'kept MiB':>10}",
    ]
    for name, row in rows.items():
        line = f"{name:<36}{row['median_ms'] / 1e3:9.4g}"
        line += f"{row['p20_ms'] / 1e3:9.4g}-{row['p80_ms'] / 1e3:<8.4g}{row['median_ms'] / first:9.2f}"
        line += f"{row['flops'] / 1e12:10.3g}{row['share_of_limit']:10.0%}"
        if name != PROBE:
            line += f"{row['peak_bytes'] / 2**20:10.0f}{row['kept_bytes'] / 2**20:10.0f}"
        lines.append(line)
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds with their spread, and peak memory, by variant."""
    from matplotlib.figure import Figure

    rows = {name: row for name, row in result["variants"].items() if name != PROBE}
    names, places = list(rows), range(len(rows))
    figure = Figure(figsize=(11, 1 + 0.4 * len(rows)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    median = [row["median_ms"] / 1e3 for row in rows.values()]
    below = [(row["median_ms"] - row["p20_ms"]) / 1e3 for row in rows.values()]
    above = [(row["p80_ms"] - row["median_ms"]) / 1e3 for row in rows.values()]
    time.barh(places, median, xerr=[below, above], color="tab:blue")
    memory.barh(places, [row["peak_bytes"] / 2**30 for row in rows.values()], color="tab:orange")
    time.set(title="seconds", yticks=places, yticklabels=names)
    time.invert_yaxis()
    memory.set(title="peak memory above the weights, GiB")
    setup = result["setup"]
    figure.suptitle(f"{setup['scale']}, {setup['pixels']} pixels, {setup['dtype']}, weights {setup['weights']}", size=9)
    figure.savefig(path, dpi=140)
