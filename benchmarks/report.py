"""Writes REPORT.md, the answers to the open questions, from the files in results/.

    python benchmarks/report.py

Every figure in it is read from a result file; a section whose file is not there is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from stitchvm_ext.bench.pages import (
    CRITERIA,
    Lines,
    Result,
    alignment_table,
    by_time,
    clean_nft_reaches,
    curves_of,
    document,
    mean_of,
    measured_on,
    paragraph,
    payback,
    payback_table,
    read_results,
    seconds_until,
    setup_of,
    short,
    short_range,
    stage_hours_table,
    suite_table,
    table,
)

RESULTS = Path(__file__).parent / "results"
REPORT = Path(__file__).parent / "REPORT.md"

INTRODUCTION = """
    What the published method leaves open: after how long stitching pays for itself, how a stitched value compares
    with preference optimisation, and what stitching costs on larger backbones. `python benchmarks/report.py` writes
    this page from the files in `benchmarks/results/`; each section names its file and the command that writes that.
    The playground is the embedded model of 64 x 64 pictures: it says how methods compare, not what they reach on a
    large model. Predictions are the planner's (`stitchvm plan`): counted from shapes, nothing was run.
"""


def page(results: Path = RESULTS) -> str:
    """The whole report."""
    found = read_results(results)
    sections = {
        "## When does stitching pay for itself?": [
            *images_measured(found), *runs_measured(found), *payback_predicted(found),
        ],
        "## Against preference optimisation": preference_optimisation(found),
        "## What stitching costs on larger backbones": stitching_predicted(found),
        "## A guided step at real scale": guided_step(found),
    }  # fmt: skip
    blocks = [["# Open questions", paragraph(INTRODUCTION)]]
    blocks += [[heading, *lines] for heading, lines in sections.items() if lines]
    return document(blocks)


# -- when stitching pays for itself ------------------------------------------------------------------------------------


def images_measured(found: dict[str, Result]) -> Lines:
    if "payback" not in found:
        return []
    result = found["payback"]
    unguided, seconds = result["figures"]["unguided"], result["seconds"]
    return [
        "### Images, measured on the playground",
        f"`python benchmarks/payback.py`, `payback.json`. {measured_on(result)}",
        paragraph(f"""
            Making the value took {sum(seconds.values()):,.0f} s; stage 2 is {result["training_steps"]} steps of
            {result["batch_size"]} images, and the search kept {result["depth"]} blocks.
        """),
        *table(("stage", "s"), [[stage, f"{taken:,.1f}"] for stage, taken in seconds.items()]),
        paragraph(f"""
            Then both methods sampled {result["prompts"]} held-out prompts, at two strengths and several numbers of
            steps. A row is a setting of StitchVM-DPS above the unguided reward (target {unguided["reward"]:.3f},
            held-out {unguided["held_out_reward"]:.3f}) that none of its others beats in both reward and time, beside
            the fastest Tweedie-DPS that reaches as much. The last column is the seconds of both stages over the seconds
            that an image saves.
        """),
        *(line for criterion in CRITERIA for line in images_by(result, criterion)),
    ]


def images_by(result: Result, criterion: str) -> Lines:
    """The table for one reward, and what it says."""
    figures, title = result["figures"], CRITERIA[criterion]
    paid = [row for row in payback(result, criterion) if row["images"] is not None]
    earliest = min(paid, key=lambda row: row["images"], default=None)
    if earliest is None:
        answer = f"By the {title} stitching pays nowhere."
    else:
        images, reward = earliest["images"], figures[earliest["stitched"]][criterion]
        answer = f"By the {title} stitching pays after {images:,} images at the earliest, at {reward:.3f}."
    best = {
        estimator: max(by_time(figures, estimator), key=lambda n: figures[n][criterion])
        for estimator in ("stitched", "Tweedie")
    }
    ours, theirs = (figures[name] for name in best.values())
    return [
        *payback_table(result, criterion),
        paragraph(f"""
            {answer} The best is {ours[criterion]:.3f} for StitchVM-DPS ({best["stitched"]},
            {ours["seconds_per_image"]:.2f} s per image) and {theirs[criterion]:.3f} for Tweedie-DPS ({best["Tweedie"]},
            {theirs["seconds_per_image"]:.2f} s).
        """),
    ]


def runs_measured(found: dict[str, Result]) -> Lines:
    """Training runs, from the stages of one file and the curves of the other."""
    if not {"payback", "alignment"} <= set(found):
        return []
    curves, goal = curves_of(found["alignment"]), clean_nft_reaches(found["alignment"])
    if goal is None or ("nft", "stitched") not in curves:
        return []
    stitching = sum(found["payback"]["seconds"].values())
    clean, stitched = (seconds_until(curves["nft", value], goal) for value in ("clean", "stitched"))
    if stitched is None:
        runs = "never: not reached"
    else:
        runs = f"after {math.ceil(stitching / (clean - stitched)):,} runs" if stitched < clean else "never"
    return [
        "### Training runs, measured on the playground",
        paragraph(f"""
            `alignment.json` (below), and the stages of `payback.json`, of another value of as many steps: DiffusionNFT
            until the mean held-out reward over seeds is {goal:.3f}, with which the runs on the clean reward end.
            Training is in the processor's seconds and the stages are in wall-clock, so the number of runs is rough.
        """),
        *table(
            ("clean reward, s", "stitched value, s", "stitching, s", "stitching pays"),
            [[f"{clean:,.0f}", "" if stitched is None else f"{stitched:,.0f}", f"{stitching:,.0f}", runs]],
        ),
    ]


def payback_predicted(found: dict[str, Result]) -> Lines:
    if "payback_planner" not in found:
        return []
    result = found["payback_planner"]
    counts = result["training_images"]
    of_any = next(iter(result["backbones"].values()))
    dps, nft = of_any["dps"], of_any["nft"]

    def predictions(method: str, unit: str) -> Lines:
        return table(
            ["", "baseline", f"its s / {unit}", f"stitched, s / {unit}", *(f"{n:,} training images" for n in counts)],
            [
                [
                    name,
                    baseline,
                    short_range(*seconds),
                    short_range(*methods[method]["stitched"]),
                    *(pays(methods[method], seconds, count) for count in counts),
                ]
                for name, methods in result["backbones"].items()
                for baseline, seconds in methods[method]["baselines"].items()
            ],
        )

    return [
        "### Predicted at real scale",
        paragraph(f"""
            `python benchmarks/payback.py --planner`, `payback_planner.json`: predictions for {result["device"]} with
            {result["reward"]}, nothing was run on one. {result["notes"][1]} The two ends of a break-even assume the
            same of the stages and of what is saved. Methods are compared at the same number of steps: whether they
            reach the same reward is another question. Stage 2 has its latents and targets cached.
        """),
        paragraph(f"""
            Images after which stitching pays, by the number of images that stage 2 trains on ({dps["epochs"]}
            epochs); {dps["resolution"]} pixels, {dps["steps"]} steps. The value reads the null text, and shares its
            prefix where there is an unconditional branch.
        """),
        *predictions("dps", "image"),
        paragraph(f"""
            Iterations of DiffusionNFT after which it pays, each of {result["nft_samples"]:,} samples, {nft["steps"]}
            steps, {nft["resolution"]} pixels, with a value stitched at these. A run has {result["nft_iterations"]} by
            default:
        """),
        *predictions("nft", "iteration"),
    ]


def pays(methods: Result, baseline: Sequence[float], images: int) -> str:
    """After how much of what is saved the stages are paid for, (low, high) by (low, high)."""
    after = []
    for search, finetuning, theirs, ours in zip(
        methods["search_hours"], methods["finetune_hours"]["cached"][str(images)], baseline, methods["stitched"],
        strict=True,
    ):  # fmt: skip
        if theirs <= ours:
            return "never"
        after.append(math.ceil(3600 * (search + finetuning) / (theirs - ours)))
    low, high = sorted(after)
    return short(low) if short(low) == short(high) else short_range(low, high)


# -- the other questions -----------------------------------------------------------------------------------------------


def preference_optimisation(found: dict[str, Result]) -> Lines:
    if "alignment" not in found:
        return []
    result = found["alignment"]
    curves = curves_of(result)
    seeds = max(map(len, curves.values()))
    begins = [curve[0] for of_method in curves.values() for curve in of_method]
    reward, held_out = (statistics.mean(p[name] for p in begins) for name in ("target_reward", "held_out_reward"))
    return [
        f"`python benchmarks/alignment.py`, `alignment.json`. {measured_on(result)}",
        paragraph(f"""
            A LoRA of the playground's generator, trained by DRaFT, DiffusionNFT and Diffusion-DPO with the clean
            reward ("clean") or with a stitched value of the same reward that reads the prompt; judged on
            {result["eval_prompts"]} held-out prompts, unguided. What a run gained, mean over {seeds} seeds with
            standard errors: before training the target reward is {reward:.3f} and the held-out reward
            {held_out:.3f}. Learning rates were tried out on some of the methods and one seed, not searched for each.
            Seconds are the processor's. The last column is the training time until the mean held-out
            reward is that with which DiffusionNFT on the clean reward ends.
        """),
        *alignment_table(result),
        *seed_by_seed(result, PAIRS),
    ]


Pairs = Sequence[tuple[tuple[str, str], tuple[str, str]]]  # (method, value), and what it is compared with
PAIRS: Pairs = (
    (("draft-1", "stitched"), ("draft-1", "clean")),
    (("draft-1", "stitched"), ("draft-3", "clean")),
    (("nft", "stitched"), ("nft", "clean")),
    (("dpo", "stitched"), ("dpo", "clean")),
)


def seed_by_seed(result: Result, pairs: Pairs) -> Lines:
    """How much more the first of a pair gained than the second one did from the same seed."""
    measures = ("target_reward", "held_out_reward", "objects")
    gains = {
        (run["method"], run["value"], run["seed"]): [run["curve"][-1][m] - run["curve"][0][m] for m in measures]
        for run in result["runs"]
    }
    rows = []
    for ours, theirs in pairs:
        both = [seed for *name, seed in gains if tuple(name) == ours and (*theirs, seed) in gains]
        more = [[a - b for a, b in zip(gains[(*ours, s)], gains[(*theirs, s)], strict=True)] for s in both]
        if more:
            rows.append([f"{', '.join(ours)} over {', '.join(theirs)}", *map(mean_of, zip(*more, strict=True))])
    head = ("", "target reward", "held-out reward", "objects right")
    return ["What the first gained more than the second, seed by seed:", *table(head, rows)] if rows else []


def stitching_predicted(found: dict[str, Result]) -> Lines:
    if "payback_planner" not in found:
        return []
    result = found["payback_planner"]
    dps = next(iter(result["backbones"].values()))["dps"]
    return [
        paragraph(f"""
            `python benchmarks/payback.py --planner`, `payback_planner.json`: predicted GPU-hours on
            {result["device"]} for {result["reward"]} at {dps["resolution"]} pixels, by the number of images of stage
            2 ({dps["epochs"]} epochs). "cached": latents and targets are computed once, as `stitchvm train` does;
            "encoded anew": in every epoch. Reading pictures from a disk is not counted.
        """),
        *stage_hours_table(result),
    ]


RATIOS = {  # of the suite: title, and whether more is better
    "faster_than_tweedie": ("times faster than Tweedie-DPS", True),
    "time_over_plain": ("time over plain", False),
    "peak_over_tweedie": ("peak over Tweedie-DPS", False),
}


def guided_step(found: dict[str, Result]) -> Lines:
    if "guided_step_real" not in found:
        return []
    result = found["guided_step_real"]
    bars = result["targets"]

    def cell(name: str, ratio: float) -> str:
        met = ratio >= bars[name] if RATIOS[name][1] else ratio <= bars[name]
        return f"{ratio:.2f}, {'met' if met else 'missed'}"

    return [
        paragraph(f"""
            `stitchvm bench --scale real --rounds 3 --out benchmarks/results`, `guided_step_real.json`.
            {measured_on(result)}
        """),
        setup_of(result),
        *suite_table(result),
        "Against the goals:",
        *table(
            (
                "",
                *(f"{title}, {'>=' if more else '<='} {bars[name]:g}" for name, (title, more) in RATIOS.items()),
                "FLOPs over plain",
            ),
            [
                [variant, *(cell(name, ratios[name]) for name in RATIOS), f"{ratios['flops_over_plain']:.2f}"]
                for variant, ratios in result["stitched"].items()
            ],
        ),
    ]


def main() -> None:
    REPORT.write_text(page())
    print(f"wrote {REPORT}")


if __name__ == "__main__":
    main()
