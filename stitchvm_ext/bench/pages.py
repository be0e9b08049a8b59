"""Pages of Markdown made of result files: what the numbers page of the site and ``benchmarks/REPORT.md`` share."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MIB = 2**20

Result = dict[str, Any]
Lines = list[str]


def read_results(folder: Path) -> dict[str, Result]:
    """The result files of a folder, by name without ".json"."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def document(blocks: Iterable[Lines]) -> str:
    """Paragraphs, headings and tables with empty lines between them, but not within tables."""
    text: Lines = []
    for block in blocks:
        for line in block:
            if text and not (line.startswith("|") and text[-1].startswith("|")):
                text.append("")
            text.append(line)
    return "\n".join(text) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> Lines:
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def paragraph(text: str) -> str:
    """One line of a text that is wrapped and indented in its source."""
    return " ".join(text.split())


def measured_on(result: Result) -> str:
    """Processor, GPU, threads, versions and commit, and whether the machine was shared."""
    machine = result["machine"]
    gpu = f" with {machine['gpu']}" if machine["gpu"] else ""
    busy = " Other programs ran on the machine meanwhile." if result.get("shared_machine") else ""
    return (
        f"Measured on {machine['cpu']}{gpu}, threads: {machine['threads']}, torch {machine['torch']}, commit "
        f"{machine['commit']}.{busy}"
    )


# -- results of ``stitchvm bench`` -------------------------------------------------------------------------------------


def is_of_suite(result: Result) -> bool:
    return {"setup", "variants"} <= set(result)


def setup_of(result: Result) -> str:
    """What a suite's figures are of."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["setup"].items()) + "."


def suite_table(result: Result) -> Lines:
    """One row per variant; "times" is its time over the first one's."""
    first = next(iter(result["variants"].values()))["median_ms"]

    def mib(row: dict[str, float], name: str) -> str:
        return f"{row[name] / MIB:.0f}" if name in row else ""

    return table(
        ("", "s, median", "20-80%", "times", "TFLOP", "of the matrix product's speed", "peak MiB", "kept MiB"),
        [
            [
                variant,
                f"{row['median_ms'] / 1e3:.3g}",
                f"{row['p20_ms'] / 1e3:.3g}-{row['p80_ms'] / 1e3:.3g}",
                f"{row['median_ms'] / first:.2f}",
                f"{row['flops'] / 1e12:.3g}",
                f"{row['share_of_limit']:.2f}",
                mib(row, "peak_bytes"),
                mib(row, "kept_bytes"),
            ]
            for variant, row in result["variants"].items()
        ],
    )


# -- results of benchmarks/alignment.py --------------------------------------------------------------------------------

Curve = list[dict[str, float]]


def curves_of(result: Result) -> dict[tuple[str, str], list[Curve]]:
    """The curves of all seeds, by (method, value)."""
    curves: dict[tuple[str, str], list[Curve]] = {}
    for run in result["runs"]:
        curves.setdefault((run["method"], run["value"]), []).append(run["curve"])
    return curves


def mean_of(figures: Sequence[float], digits: int = 3) -> str:
    """Mean and, from two on, its standard error."""
    mean = f"{statistics.mean(figures):.{digits}f}"
    if len(figures) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(figures) / len(figures) ** 0.5:.{digits}f}"


def clean_nft_reaches(result: Result) -> float | None:
    """The held-out reward with which DiffusionNFT on the clean reward ends, mean over seeds; None without such runs."""
    curves = curves_of(result).get(("nft", "clean"))
    return None if curves is None else statistics.mean(curve[-1]["held_out_reward"] for curve in curves)


def seconds_until(curves: list[Curve], held_out_reward: float) -> float | None:
    """Training seconds, mean over seeds, at the first evaluation whose mean held-out reward is at least this one; None
    where there is none.
    """
    for points in zip(*curves, strict=True):
        if statistics.mean(point["held_out_reward"] for point in points) >= held_out_reward:
            return statistics.mean(point["seconds"] for point in points)
    return None


def alignment_table(result: Result) -> Lines:
    """One row per method: what a run gained, what it cost, and when it was as good as DiffusionNFT's end.

    Gains, not ends: every seed has pictures of its own to begin with.
    """
    goal = clean_nft_reaches(result)

    def reached(curves: list[Curve]) -> str:
        if goal is None:
            return ""
        seconds = seconds_until(curves, goal)
        return "not reached" if seconds is None else f"{seconds:.0f}"

    def row(name: tuple[str, str], curves: list[Curve]) -> Lines:
        ends = [curve[-1] for curve in curves]
        measures = ("target_reward", "held_out_reward", "objects")
        gains = [[curve[-1][key] - curve[0][key] for curve in curves] for key in measures]
        return [
            ", ".join(name),
            *map(mean_of, gains),
            *(f"{statistics.mean(end[key] for end in ends):.0f}" for key in ("seconds", "denoiser_evaluations")),
            reached(curves),
        ]

    return table(
        ("method, value", "target reward gained", "held-out reward gained", "objects right gained", "s of training",
         "denoiser evaluations", "s until clean NFT's held-out reward"),
        [row(name, curves) for name, curves in curves_of(result).items()],
    )  # fmt: skip


# -- results of benchmarks/payback.py ----------------------------------------------------------------------------------

CRITERIA = {"reward": "target reward", "held_out_reward": "held-out reward"}


def short_range(low: float, high: float) -> str:
    """Two significant digits each; predictions deserve no more."""
    return f"{short(low)} to {short(high)}"


def short(number: float) -> str:
    return f"{float(f'{number:.2g}'):,g}"


def stage_hours_table(result: Result) -> Lines:
    """The planner's GPU-hours of stage 1, and of stage 2 by number of images and by what is cached."""
    counts = result["training_images"]
    return table(
        ("", "stage 1", "stage 2", *(f"{count:,} images" for count in counts)),
        [
            [name, short_range(*found["dps"]["search_hours"]), way, *(short_range(*hours[str(n)]) for n in counts)]
            for name, found in result["backbones"].items()
            for way, hours in found["dps"]["finetune_hours"].items()
        ],
    )


def payback(result: Result, criterion: str) -> list[dict[str, Any]]:
    """StitchVM-DPS's settings above the unguided reward that none of its others beats in reward and time, by rising
    reward, each with the fastest Tweedie-DPS of at least its reward (None where none reaches it), and the images after
    which the seconds of making the value are saved (None: nothing is).

    Args:
        criterion: the reward that counts, of :data:`CRITERIA`.
    """
    figures, making = result["figures"], sum(result["seconds"].values())
    rows: list[dict[str, Any]] = []
    best = figures["unguided"][criterion]
    for name in by_time(figures, "stitched"):
        reward, seconds = figures[name][criterion], figures[name]["seconds_per_image"]
        if reward <= best:
            continue
        best, images = reward, None
        tweedie = next((n for n in by_time(figures, "Tweedie") if figures[n][criterion] >= reward), None)
        if tweedie is not None:
            saved = figures[tweedie]["seconds_per_image"] - seconds
            images = math.ceil(making / saved) if saved > 0 else None
        rows.append({"stitched": name, "tweedie": tweedie, "images": images})
    return rows


def by_time(figures: dict[str, dict[str, float]], estimator: str) -> list[str]:
    """An estimator's settings, the fastest first."""
    return sorted((n for n in figures if n.startswith(estimator)), key=lambda n: figures[n]["seconds_per_image"])


def payback_table(result: Result, criterion: str) -> Lines:
    """:func:`payback` with rewards and seconds."""
    figures, title = result["figures"], CRITERIA[criterion]

    def cells(name: str | None) -> Lines:
        if name is None:
            return ["none reaches it", "", ""]
        return [name, f"{figures[name][criterion]:.3f}", f"{figures[name]['seconds_per_image']:.2f}"]

    def images(row: dict[str, Any]) -> str:
        if row["tweedie"] is None:
            return ""
        return "never" if row["images"] is None else f"{row['images']:,}"

    return table(
        ("StitchVM-DPS", title, "s / image", "Tweedie-DPS", title, "s / image", "pays after images"),
        [[*cells(row["stitched"]), *cells(row["tweedie"]), images(row)] for row in payback(result, criterion)],
    )
