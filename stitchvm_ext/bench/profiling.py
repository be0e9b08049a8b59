"""Where a step's time goes: a trace of its operators, and a table by phase."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .harness import save

# Ranges that the package opens (stitchvm_ext.measure.phase), none within another. "denoiser" are whole passes, "prefix"
# and "rest of denoiser" the two parts of a pass that serves a value too.
PHASES = ("prefix", "rest of denoiser", "denoiser", "stitch", "suffix", "decode", "reward", "backward")


def profile(
    calls: dict[str, Callable[[], Any]], name: str, out: Path, device: str = "cpu", warmup: bool = True
) -> dict[str, dict[str, float]]:
    """One call of each under PyTorch's profiler, after another one with ``warmup``; returns milliseconds by phase.

    Writes NAME-CALL.trace.json, which chrome://tracing and Perfetto open, and NAME.json, and prints the table. On CUDA
    each runs once more with its ranges as NVTX ranges, which Nsight Systems shows if the process runs under it.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for title, call in calls.items():
        if warmup:  # the first call of a process allocates what later ones find
            call()
        rows[title], trace = profile_one(call, device)
        trace.export_chrome_trace(str(out / f"{name}-{re.sub('[^a-z0-9]+', '-', title.lower())}.trace.json"))
        print(f"profiled {title}", flush=True)
        if device != "cpu":
            with torch.autograd.profiler.emit_nvtx():
                call()
    save(name, {"unit": "ms", "phases": rows}, out)
    print(f"\n{table(rows)}\n\nwrote {name}.json and {len(rows)} traces into {out}")
    return rows


def profile_one(call: Callable[[], Any], device: str = "cpu") -> tuple[dict[str, float], torch.profiler.profile]:
    """Milliseconds by phase, "other" and "total"; and the finished profiler.

    On the CPU these are the phases' wall-clock time. On CUDA the device's time: autograd launches kernels from a thread
    of its own there, outside of any range, so that "backward" is found as what no other phase has launched.
    """
    on_gpu = device != "cpu"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as trace, torch.profiler.record_function("whole call"):
        call()
        if on_gpu:
            torch.cuda.synchronize()
    events = trace.key_averages()
    ranges = {e.key: (e.device_time_total if on_gpu else e.cpu_time_total) / 1e3 for e in events if e.cpu_time_total}
    found = {phase: ranges[phase] for phase in PHASES if phase in ranges}
    if on_gpu:
        total = sum(e.self_device_time_total for e in events) / 1e3
        if "backward" in found:
            found["backward"] = total - sum(ms for phase, ms in found.items() if phase != "backward")
    else:
        total = ranges["whole call"]
    return {**found, "other": total - sum(found.values()), "total": total}, trace


def table(rows: dict[str, dict[str, float]]) -> str:
    """Milliseconds; one line per call, one column per phase that occurs."""
    columns = [c for c in (*PHASES, "other", "total") if any(c in row for row in rows.values())]
    width = max(map(len, rows)) + 1
    lines = ["ms".ljust(width) + "".join(c.rjust(max(len(c), 8) + 2) for c in columns)]
    for title, row in rows.items():
        cells = (f"{row[c]:.4g}" if c in row else "-" for c in columns)
        pairs = zip(cells, columns, strict=True)
        lines.append(title.ljust(width) + "".join(cell.rjust(max(len(c), 8) + 2) for cell, c in pairs))
    return "\n".join(lines)
