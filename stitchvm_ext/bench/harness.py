"""What every benchmark shares: where results go and what machine they came from."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).parents[2] / "benchmarks"  # in a source folder; an installed package has none
RESULTS = Path(os.environ.get("STITCHVM_RESULTS", _SOURCE / "results" if _SOURCE.is_dir() else "stitchvm-bench"))


def machine() -> dict[str, Any]:
    """Processor, threads, GPU, versions and the commit that was measured."""
    import diffusers

    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit = ""
    if _SOURCE.is_dir():
        ask = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(ask, cwd=_SOURCE, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit or None,
    }


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``name``.json with the machine beside the result; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    partial.replace(path)
    return path


def alternate(
    calls: dict[str, Callable[[], Any]],
    *,
    seconds: float,
    device: str = "cpu",
    rounds: int = 5,
    warmup: int = 2,
    on_round: Callable[[dict[str, list[float]]], Any] = lambda times: None,
) -> dict[str, dict[str, float]]:
    """Milliseconds per call of each entry, taken in turns for ``seconds`` and at least ``rounds`` (two) rounds.

    Noise from other work on the machine then meets all of them. Median, 20th and 80th percentile. ``on_round`` is
    called after every round with the milliseconds so far.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < rounds:
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
        on_round(times)
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 2
    return {"median_ms": statistics.median(values), "p20_ms": low, "p80_ms": high, "rounds": len(values)}


def speedups(row: dict[str, dict[str, float]], ours: str) -> dict[str, float]:
    """Medians of the others over that of ``ours``."""
    return {name: row[name]["median_ms"] / row[ours]["median_ms"] for name in row if name != ours}


def bytes_kept(run: Callable[[], Any], exclude: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of ``run``, without those of ``exclude``."""
    known = {t.untyped_storage().data_ptr() for t in exclude}
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = run()  # alive until the storages are counted: freed memory would be counted under one address
        total = sum(storages.values())
    del output
    return total
