"""``stitchvm bench``: measure on this machine what the method costs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .options import hide_loading_bars

QUESTIONS = {
    "guided-step": "guided_step",
    "value-gradient": "value_gradient",
    "proposal": "proposals",
    "search": "search",
    "stage2": "stage2",
    "nft": "nft",
    "draft": "draft",
}
"""The module of :mod:`stitchvm_ext.bench` that answers it."""

PROFILED = ("guided-step", "value-gradient", "proposal")


def bench(
    name: Annotated[Literal[tuple(QUESTIONS)], tyro.conf.Positional] = "guided-step",
    scale: Literal["playground", "quarter", "real"] = "playground",
    out: Path = Path("stitchvm-bench"),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    pixels: int | None = None,
    rounds: int = 5,
    profile: bool = False,
) -> None:
    """Measure on this machine what the method costs; random weights are enough for that, and nothing is downloaded.

    Writes a JSON file with machine and versions, and a plot, and prints the table: medians over alternating runs,
    their spread, peak memory, and how much of the machine's speed at matrix products is reached.

    Args:
        name: guided-step: one step of plain sampling, of Tweedie-DPS and of StitchVM-DPS; value-gradient: V and its
            gradient by themselves; proposal: V alone, as particle methods ask for it; search: the closed-form search
            against a least-squares solution per pair; stage2: images per second with and without caches; nft, draft: an
            iteration of DiffusionNFT or DRaFT, with a clean reward and with a stitched value (playground alone).
        scale: playground is the small model that ships with this package, with its trained weights; quarter a quarter
            of SD3.5 Medium at its true width, with its autoencoder; real the whole of it with ViT-L/14-336, random
            weights: bfloat16, or, on a CPU without instructions for it, float32 (20 GB in all at 448 pixels, most of
            it for Tweedie-DPS; minutes per round).
        out: folder for the results.
        device: auto is the GPU where there is one.
        pixels: side of the image, by default the scale's: on a CPU 256 for quarter and 448 for real, on a GPU 512 and
            1024.
        rounds: how often each variant runs, in turns; at least 2.
        profile: in place of that run each once under PyTorch's profiler: a trace for chrome://tracing or Perfetto, and
            a table by phase; on a GPU with NVTX ranges.
    """
    import torch

    from ..bench.profiling import profile as profile_calls

    if rounds < 2:
        raise ValueError(f"rounds: expected at least 2, got {rounds}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu, as PyTorch finds no GPU, got 'cuda'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    hide_loading_bars()
    question = import_module(f"stitchvm_ext.bench.{QUESTIONS[name]}")
    result = f"{QUESTIONS[name]}_{scale}" + ("" if device == "cpu" else "_cuda")
    if profile and name not in PROFILED:
        raise ValueError(f"profile: expected one of {list(PROFILED)}, got {name!r}")
    if profile:
        calls = question.calls(question.build(scale, device, pixels))
        profile_calls(calls, f"{result}_phases", out, device, warmup=scale != "real")
    else:
        question.run(scale, result, out=out, device=device, pixels=pixels, rounds=rounds)
