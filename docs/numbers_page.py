"""The numbers page of the documentation, made of ``benchmarks/results/*.json`` whenever the site is built.

``python docs/numbers_page.py`` prints it. MkDocs calls :func:`on_files`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from stitchvm_ext.bench.pages import (
    MIB,
    Lines,
    Result,
    alignment_table,
    document,
    is_of_suite,
    payback_table,
    read_results,
    setup_of,
    stage_hours_table,
    suite_table,
    table,
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"


def guidance(result: Result) -> Lines:
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


def noise_levels(result: Result) -> Lines:
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


def shared_prefix(result: Result) -> Lines:
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


def timed_rows(result: Result) -> Lines:
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


def value_gradient(result: Result) -> Lines:
    settings = result["settings"]
    return [
        "## A value gradient at true width",
        f"{settings['depth']} blocks of {settings['backbone']}, the stitch and {settings['tower']} with random weights"
        f", {settings['side']}x{settings['side']} image tokens, on {settings['device']}.",
        *timed_rows(result),
    ]


def denoiser(result: Result) -> Lines:
    settings = result["settings"]
    return [
        "## A denoising pass at true width",
        f"{settings['blocks']} blocks of {settings['backbone']} with random weights, classifier-free guidance, "
        f"{settings['side']}x{settings['side']} image tokens, on {settings['device']}.",
        *timed_rows(result),
    ]


def value_memory(result: Result) -> Lines:
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


def search(result: Result) -> Lines:
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


def inference_methods(result: Result, title: str = "Inference-time methods") -> Lines:
    scores = ("reward", "held_out_reward", "objects")
    passes = ("denoiser", "value", "decoder")
    with_flops = all("flops_per_image" in row for row in result["methods"].values())
    return [
        f"## {title}",
        f"{result['prompts']} held-out prompts, {result['seeds']} seeds each, {result['steps']} steps, guidance scale "
        f"{result['guidance_scale']:g}; means with standard errors over prompts, and forward passes per image.",
        *table(
            ("", "target reward", "held-out reward", "objects", "diversity", *passes, *["GFLOP"] * with_flops),
            [
                [
                    name,
                    *(f"{row['means'][k]:.3f} ± {row['standard_errors'][k]:.3f}" for k in scores),
                    f"{row['means']['diversity']:.3f}",
                    *(f"{row['evaluations_per_image'][k]:.0f}" for k in passes),
                    *([f"{row['flops_per_image'] / 1e9:.0f}"] if with_flops else []),
                ]
                for name, row in result["methods"].items()
            ],
        ),
    ]


def gap(result: Result) -> Lines:
    def best(figures: Result, method: str) -> str:
        return f"{max(row['reward'] for name, row in figures.items() if name.startswith(method)):.3f}"

    return [
        "## Generator, stage 2, and the gap in the target reward",
        f"{result['prompts']} prompts, {result['steps']} steps; target reward, of each method at the better strength.",
        *table(
            ("steps of the generator", "epochs of stage 2", "unguided", "StitchVM-DPS", "Tweedie-DPS"),
            [
                [
                    f"{cell['generator_steps']:,}",
                    cell["stage_2_epochs"],
                    *(best(cell["figures"], method) for method in ("unguided", "stitched", "Tweedie")),
                ]
                for cell in result["cells"].values()
            ],
        ),
    ]


def proposal_spread(result: Result) -> Lines:
    return [
        "## What a value can choose between",
        f"{result['proposals']} proposals for the next latent, {result['prompts']} prompts: the spread of their values "
        "by the two estimators, and the correlation between these.",
        *table(
            ("noise level", "spread, stitched", "spread, Tweedie", "correlation"),
            [[f"{row[k]:.3f}" for k in ("sigma", "stitched", "Tweedie", "correlation")] for row in result["rows"]],
        ),
    ]


def group_signal(result: Result) -> Lines:
    names = [name for name in result["rows"][0] if name not in ("step", "sigma")]
    is_noisy = result.get("transition", "ode") != "ode"
    kind, learned = "deterministic rollouts", "captioned pictures and from the generator's own rollouts"
    if is_noisy:
        kind = f"rollouts with noise and a guidance scale of {result['guidance_scale']:g}"
        learned = "captioned pictures, from deterministic rollouts and from rollouts such as these"
    return [
        f"## What a value tells apart among samples of one prompt{', with noise and guidance' * is_noisy}",
        f"{result['prompts']} prompts, {result['group_size']} {kind}, of {result['steps']} steps each: "
        "the correlation, within prompts, with the clean reward that a rollout ends with. "
        f"{', '.join(name for name in names if name not in ('stitched', 'Tweedie'))} read the prompt, and learned from "
        f"{learned}.",
        *table(
            ("noise level", *names),
            [[f"{row['sigma']:.3f}", *(f"{row[name]:.2f}" for name in names)] for row in result["rows"]],
        ),
    ]


def payback_section(result: Result) -> Lines:
    return [
        "## After how many images stitching pays",
        "On the playground, stages and images in one run. [Open questions](report.md) says how to read it.",
        *payback_table(result, "reward"),
        "By the held-out reward:",
        *payback_table(result, "held_out_reward"),
    ]


def payback_planner(result: Result) -> Lines:
    return [
        "## What stitching costs on large backbones",
        f"GPU-hours on {result['device']} for {result['reward']}, predicted by the planner; nothing was run.",
        *stage_hours_table(result),
    ]


def alignment(result: Result, title: str = "Training with clean rewards and stitched values") -> Lines:
    return [
        f"## {title}",
        "What a LoRA of the playground's generator gains, mean with standard error over seeds; the stitched value "
        "reads the prompt. See [open questions](report.md).",
        *alignment_table(result),
    ]


def nft_iteration(result: Result) -> Lines:
    shares = result["share_of_time"]
    return [
        "## An iteration of DiffusionNFT",
        "On the playground, in turns. The published one merges no adapter and runs the reference model too. Last "
        "column: of the clean runs' time, when the stitched ones have their last held-out reward.",
        *table(
            ("", "s per iteration", "stitched, of its time"),
            [
                [name, f"{of['median_ms'] / 1000:.1f}", f"{shares[name]:.2f}" if name in shares else ""]
                for name, of in result["times"].items()
            ],
        ),
    ]


def ops(result: Result) -> Lines:
    """One row per case and pass, the dtypes beside each other."""
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for row in result["rows"]:
        rows.setdefault((row["case"], row["pass"]), {})[row["dtype"]] = row
    dtypes = result["settings"]["dtypes"]

    def cells(row: Result | None) -> Lines:
        if row is None:
            return [""] * 4
        speedups = (f"{row['speedup'][k]:.2f}" if k in row["speedup"] else "" for k in ("eager", "compile"))
        return [f"{row['kernel']['median_ms']:.3g}", *speedups, f"{row['bandwidth_share']:.2f}"]

    side = result["settings"]["side"]
    return [
        f"## Fused operators, {side}x{side} image tokens",
        f'On {result["settings"]["device"]}. "eager" and "compile": the time of the other implementation over the '
        'kernel\'s; "copy": the time of copying as many bytes over it.',
        *table(
            ("", "pass", *(f"{d}{what}" for d in dtypes for what in (" ms", " eager", " compile", " copy"))),
            [[*name, *(cell for d in dtypes for cell in cells(found.get(d)))] for name, found in rows.items()],
        ),
    ]


def training_latents(result: Result) -> Lines:
    trained_on = ("real images", "generated images", "rollouts")

    def against(row: Result, name: str) -> str:
        return f"{row[f'{name} rmse']:.3f}, {row[f'{name} spearman']:.2f}"

    return [
        "## Latents to train on",
        f"Values trained on three kinds of latents, at {result['settings']['latents']} latents against Monte Carlo, "
        f"{result['settings']['rollouts']} rollouts each: root mean squared error, rank correlation.",
        *table(
            ("latents", "noise level", *trained_on),
            [
                [
                    where,
                    f"{row['sigma']:.2f}",
                    *(f"{row[f'{n} rmse']:.3f}, {row[f'{n} spearman']:.2f}" for n in trained_on),
                ]
                for where, rows in result["against_monte_carlo"].items()
                for row in rows
            ],
        ),
    ]


def stitch_tokens(result: Result) -> Lines:
    return [
        "## Position and class tokens at j > 1",
        f"Depth {result['depth']}, {result['steps']} steps, means of {result['seeds']} seeds, {result['held_out']} "
        "held-out pictures: retrieval R@1 by noise level.",
        *table(
            ("j", "tokens", *(f"{level:g}" for level in result["sigmas"])),
            [
                [row["layer"], row["tokens"], *(f"{share:.3f}" for share in row["after"]["r_at_1"])]
                for row in result["values"]
            ],
        ),
    ]


def of_the_suite(name: str, result: Result) -> Lines:
    return [f"## `stitchvm bench`: `{name}`", setup_of(result), *suite_table(result)]


# In the order of the page; those of `stitchvm bench` come after.
SECTIONS: dict[str, Callable[[Result], Lines]] = {
    "guidance": guidance,
    "inference_methods": inference_methods,
    "inference_methods_prompted": functools.partial(
        inference_methods, title="Inference-time methods, with a value that reads the prompt"
    ),
    "inference_methods_proposals": functools.partial(
        inference_methods, title="FK steering with proposals, plain and twisted by the value's gradient"
    ),
    "inference_methods_dps": functools.partial(inference_methods, title="DPS by the SDE"),
    "group_signal": group_signal,
    "group_signal_linear_sde": group_signal,
    "gap": gap,
    "proposal_spread": proposal_spread,
    "payback": payback_section,
    "payback_planner": payback_planner,
    "alignment": alignment,
    "nft_values": functools.partial(
        alignment, title="DiffusionNFT with the exact value, and with one learned from rollouts"
    ),
    "nft_iteration": nft_iteration,
    "noise_levels": noise_levels,
    "on_policy": training_latents,  # MkDocs takes every name on_... for an event
    "stitch_tokens": stitch_tokens,
    "shared_prefix": shared_prefix,
    "value_gradient": value_gradient,
    "denoiser": denoiser,
    "value_memory_1024px_vit-l-14-336": value_memory,
    "value_memory_1024px_vit-h-14": value_memory,
    "search": search,
    "ops": ops,
    "ops_1024px": ops,
}

INTRODUCTION = """\
# Numbers

Every figure here is read from a file in `benchmarks/results/` when the site is built, and every file is written by a
command of the repository; `benchmarks/README.md` has the commands and what the figures do not show. Figures of the
embedded model say how the methods compare, not what they reach on a large one; those at true width have random weights.
"""


def page(results: Path = RESULTS) -> str:
    found = read_results(results)
    blocks = [[INTRODUCTION.rstrip()], *(make(found[name]) for name, make in SECTIONS.items() if name in found)]
    blocks += [of_the_suite(name, result) for name, result in found.items() if is_of_suite(result)]
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
    return document(blocks)


def on_files(files, config):
    """MkDocs: adds the page, and the report beside it, to the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "numbers.md", content=page()))
    files.append(File.generated(config, "report.md", content=(BENCHMARKS / "REPORT.md").read_text()))
    return files


if __name__ == "__main__":
    print(page(), end="")
