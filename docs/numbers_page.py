"""The numbers page of the documentation, made of ``benchmarks/results/*.json`` whenever the site is built.

``python docs/numbers_page.py`` prints it. MkDocs calls :func:`on_files`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MIB = 2**20

Result = dict[str, Any]


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def guidance(result: Result) -> list[str]:
    def row(name: str, f: dict[str, float]):
        scores = [f"{f[k]:.3f}" for k in ("reward", "held_out_reward")]
        shares = [f"{f[k]:.2f}" for k in ("objects", "colors", "count", "seconds_per_image")]
        return [name, *scores, *shares, f"{f['peak_bytes'] / MIB:.0f}"]

    return [
        "## StitchVM-DPS against Tweedie-DPS",
        f"{result['comparison_prompts']} held-out prompts, {result['steps']} steps, guidance scale "
        f"{result['guidance_scale']:g}; settings by a sweep on {result['sweep_prompts']} other prompts. Per image "
        f"Tweedie-DPS takes {result['time_ratio_tweedie_over_stitched']:.2f} times as long, "
        f"{result['time_ratio_of_the_guidance_part']:.2f} times of what guidance adds.",
        *table(
            ("", "target reward", "held-out reward", "objects", "colours", "count", "s / image", "extra MiB"),
            [row(name, figures) for name, figures in result["comparison"].items()],
        ),
    ]


def noise_levels(result: Result) -> list[str]:
    measures = {"r_at_1": "retrieval R@1", "spearman": "rank correlation with the clean reward"}
    levels = [row["sigma"] for row in result["accuracy"]["stitched"]]
    return [
        "## Values of noisy latents",
        f"{result['images']} held-out pictures; R@1 of the clean reward itself: {result['clean_r_at_1']:.3f}.",
        *table(
            ("noise level", *(f"{level:g}" for level in levels)),
            [
                [f"{name}, {title}", *(f"{row[measure]:.3f}" for row in rows)]
                for measure, title in measures.items()
                for name, rows in result["accuracy"].items()
            ],
        ),
    ]


def shared_prefix(result: Result) -> list[str]:
    titles = {"plain": "no value", "shared": "shared prefix", "separate": "a prefix of its own"}
    passes, seconds = result["denoiser_evaluations_per_image"], result["seconds_per_image"]
    difference = result["largest_difference_after_all_steps"]["images"]
    return [
        "## The shared prefix",
        f"{result['prompts']} prompts, {result['steps']} steps, {result['depth']} of {result['backbone_depth']} blocks "
        f"kept. Largest difference between images of the two: {difference:g}.",
        *table(
            ("", "transformer passes per image", "s / image"),
            [[title, f"{passes[name]:.2f}", f"{seconds[name]:.3f}"] for name, title in titles.items()],
        ),
    ]


def timed_rows(result: Result) -> list[str]:
    """Seconds and peak memory by implementation and dtype."""
    names = [name for name, entry in result["rows"][0].items() if isinstance(entry, dict) and "median_ms" in entry]
    dtypes = [row["dtype"] for row in result["rows"]]
    return table(
        ("", *(f"{d}, s" for d in dtypes), *(f"{d}, peak MiB" for d in dtypes)),
        [
            [
                name,
                *(f"{row[name]['median_ms'] / 1e3:.2f}" for row in result["rows"]),
                *(f"{row['peak_bytes'][name] / MIB:.0f}" for row in result["rows"]),
            ]
            for name in names
        ],
    )


def value_gradient(result: Result) -> list[str]:
    settings = result["settings"]
    return [
        "## A value gradient at true width",
        f"{settings['depth']} blocks of {settings['backbone']}, the stitch and {settings['tower']} with random weights"
        f", {settings['side']}x{settings['side']} image tokens, on {settings['device']}.",
        *timed_rows(result),
    ]


def denoiser(result: Result) -> list[str]:
    settings = result["settings"]
    return [
        "## A denoising pass at true width",
        f"{settings['blocks']} blocks of {settings['backbone']} with random weights, classifier-free guidance, "
        f"{settings['side']}x{settings['side']} image tokens, on {settings['device']}.",
        *timed_rows(result),
    ]


def value_memory(result: Result) -> list[str]:
    settings = result["settings"]
    return [
        f"## Activations kept for the value gradient, {settings['tower']}",
        f"{settings['depth']} blocks of {settings['backbone']}, {settings['side']}x{settings['side']} image tokens, "
        "counted by saved-tensor hooks.",
        *table(
            ("", "dtype", "MiB", "share of eager"),
            [
                [name, row["dtype"], f"{kept / MIB:.0f}", f"{row['kept_share'][name]:.3f}"]
                for row in result["rows"]
                for name, kept in row["bytes_kept"].items()
            ],
        ),
    ]


def search(result: Result) -> list[str]:
    grid = result["whole_grid"]
    return [
        "## The closed-form search",
        f"{result['depths']} depths of {result['backbone']} against j = 1..{result['layers']} of {result['tower']}, "
        f"{grid['images']} images, on {result['machine']['threads']} thread; grids of pairs are extrapolated from "
        "pairs that were timed.",
        *table(
            ("", "s for the grid", "times ours"),
            [
                ["ours", f"{grid['ours_s']['total']:.0f}", ""],
                *(
                    [f"a pair at a time, {driver}", f"{seconds:.0f}", f"{grid['speedup'][driver]:.1f}"]
                    for driver, seconds in grid["grid_s"].items()
                ),
            ],
        ),
    ]


# In the order of the page. What is not here is in the last table alone.
SECTIONS: dict[str, Callable[[Result], list[str]]] = {
    "guidance": guidance,
    "noise_levels": noise_levels,
    "shared_prefix": shared_prefix,
    "value_gradient": value_gradient,
    "denoiser": denoiser,
    "value_memory_1024px_vit-l-14-336": value_memory,
    "value_memory_1024px_vit-h-14": value_memory,
    "search": search,
}

INTRODUCTION = """\
# Numbers

Every figure here is read from a file in `benchmarks/results/` when the site is built, and every file is written by a
command of the repository; `benchmarks/README.md` has the commands and what the figures do not show. Figures of the
embedded model say how the methods compare, not what they reach on a large one; those at true width have random weights.
"""


def page(results: Path = RESULTS) -> str:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    blocks = [[INTRODUCTION.rstrip()], *(make(found[name]) for name, make in SECTIONS.items() if name in found)]
    blocks.append(["## All results", "Files, and the machine and commit that each was measured on."])
    machines = {name: result["machine"] for name, result in found.items() if "machine" in result}
    blocks.append(
        table(
            ("file", "processor", "threads", "GPU", "torch", "commit"),
            [
                [f"`{name}.json`", *(m.get(k) or "" for k in ("cpu", "threads", "gpu", "torch", "commit"))]
                for name, m in machines.items()
            ],
        )
    )
    text = []
    for block in blocks:
        for line in block:
            if text and not (line.startswith("|") and text[-1].startswith("|")):
                text.append("")
            text.append(line)
    return "\n".join(text) + "\n"


def on_files(files, config):
    """MkDocs: adds the page to the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "numbers.md", content=page()))
    return files


if __name__ == "__main__":
    print(page(), end="")
