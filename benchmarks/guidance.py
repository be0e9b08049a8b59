"""StitchVM-DPS against Tweedie-DPS, on the same prompts and seeds.

    python benchmarks/guidance.py

First a sweep: strengths that bracket each method's best, for every strength schedule. Then each method at its best
setting, by the target reward and by the held-out one, on prompts that the sweep did not see: at equal steps, and with
the stitched method taking as many more steps as its speed allows in the same time. Target reward, held-out reward,
exact checker, seconds and peak memory; writes results/guidance.json and guidance.png.
"""

from __future__ import annotations

import argparse

from tqdm import tqdm

from stitchvm_ext import TweedieValue
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.evaluation.compare import Contender
from stitchvm_ext.playground import load_pipeline, load_reward, load_value
from stitchvm_ext.playground.experiments import compare_methods, held_out_prompts

STRENGTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
SCHEDULES = ("constant", "sigma", "alpha")
CRITERIA = ("reward", "held_out_reward")
COLUMNS = (*CRITERIA, "objects", "colors", "count", "seconds_per_image", "peak_bytes")
CHUNK = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep-prompts", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=72, help="of the comparison at the best settings")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    args = parser.parse_args()

    pipe, reward = load_pipeline(), load_reward("clip")
    rewards = {"reward": reward, "held_out_reward": load_reward("clip", held_out=True)}
    estimators = {"stitched": load_value(pipe), "Tweedie": TweedieValue(pipe, reward)}
    prompts = held_out_prompts(args.sweep_prompts + args.prompts)
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}

    methods = [Contender("unguided", None)]
    for name, value in estimators.items():
        for schedule in args.schedules:
            for strength in args.strengths:
                setting = {"strength": strength, "schedule": schedule}
                methods.append(Contender(f"{name} {schedule} {strength:g}", value, setting))
    swept = run(pipe, methods, prompts[: args.sweep_prompts], rewards, "sweep", options)
    print(f"\nsweep over {args.sweep_prompts} prompts\n{table(swept)}", flush=True)

    by_name = {m.name: m for m in methods}
    best = {name: {c: best_setting(swept, name, c) for c in CRITERIA} for name in estimators}
    chosen = {by_name[m].name: by_name[m] for settings in best.values() for m in settings.values()}
    seconds = {name: swept[best[name]["reward"]]["seconds_per_image"] for name in estimators}
    ratio = seconds["Tweedie"] / seconds["stitched"]
    longer = by_name[best["stitched"]["reward"]]
    steps = round(args.steps * ratio)
    setting = {**longer.options, "num_inference_steps": steps}
    equal_time = Contender(f"{longer.name}, {steps} steps", longer.value, setting)
    methods = [Contender("unguided", None), *chosen.values(), equal_time]
    compared = run(pipe, methods, prompts[args.sweep_prompts :], rewards, "comparison", options)
    print(f"\nbest settings on {args.prompts} other prompts\n{table(compared)}")

    seconds = {name: compared[best[name]["reward"]]["seconds_per_image"] for name in estimators}
    plain = compared["unguided"]["seconds_per_image"]
    result = {
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "sweep_prompts": args.sweep_prompts,
        "sweep": swept,
        "best": best,
        "time_ratio_tweedie_over_stitched": seconds["Tweedie"] / seconds["stitched"],
        "time_ratio_of_the_guidance_part": (seconds["Tweedie"] - plain) / (seconds["stitched"] - plain),
        "comparison_prompts": args.prompts,
        "comparison": compared,
    }
    print(
        f"\nTweedie-DPS takes {result['time_ratio_tweedie_over_stitched']:.2f}x the time per image of StitchVM-DPS, "
        f"{result['time_ratio_of_the_guidance_part']:.2f}x on what guidance adds; wrote {save('guidance', result)}"
    )
    plot(swept, args, RESULTS / "guidance.png")


def best_setting(figures: dict[str, dict[str, float]], estimator: str, criterion: str) -> str:
    """The estimator's method with the highest figure."""
    return max((name for name in figures if name.startswith(estimator)), key=lambda name: figures[name][criterion])


def run(pipe, methods, prompts, rewards, label: str, options: dict) -> dict[str, dict[str, float]]:
    """Figures by method; a method's own options win over the common ones."""
    methods = [Contender(m.name, m.value, {**options, **m.options}) for m in methods]
    with tqdm(total=len(methods) * -(-len(prompts) // CHUNK), desc=label) as bar:
        results = compare_methods(pipe, methods, prompts, rewards, chunk=CHUNK, on_chunk=bar.update)
    return {name: r.figures for name, r in results.items()}


def table(figures: dict[str, dict[str, float]]) -> str:
    """One line per method."""
    width = max(map(len, figures))
    lines = [" " * width + "".join(c.rjust(18) for c in COLUMNS)]
    lines += [name.ljust(width) + "".join(f"{f[c]:18.4g}" for c in COLUMNS) for name, f in figures.items()]
    return "\n".join(lines)


def plot(figures: dict[str, dict[str, float]], args, path) -> None:
    """Target reward, held-out reward and checker accuracy over strength."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = {"reward": "target reward", "held_out_reward": "held-out reward", "objects": "checker: objects right"}
    for ax, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        ax.axhline(figures["unguided"][key], color="grey", linestyle="--", label="unguided")
        for name, color in (("stitched", "tab:blue"), ("Tweedie", "tab:orange")):
            for schedule, style in zip(args.schedules, ("-", ":", "-."), strict=False):
                rows = [figures[f"{name} {schedule} {s:g}"][key] for s in args.strengths]
                ax.plot(args.strengths, rows, style, color=color, marker="o", markersize=3, label=f"{name}, {schedule}")
        ax.set(title=title, xlabel="strength (relative to the velocity)", xscale="log")
        ax.set_xticks(args.strengths, [f"{s:g}" for s in args.strengths])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
