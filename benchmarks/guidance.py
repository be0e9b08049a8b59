"""StitchVM-DPS against Tweedie-DPS: the same prompts and seeds over a sweep of strengths that brackets each one's best.

    python benchmarks/guidance.py

Target reward, a held-out reward, the exact checker, seconds and peak memory; at equal steps, and at equal wall-clock
(the stitched method with as many more steps as its speed allows). Writes results/guidance.json and guidance.png.
"""

from __future__ import annotations

import argparse

from harness import RESULTS, save
from tqdm import tqdm

from stitchvm_ext import TweedieValue
from stitchvm_ext.playground import load_pipeline, load_reward, load_value
from stitchvm_ext.playground.experiments import Method, compare_methods, held_out_prompts

STRENGTHS = (0.1, 0.25, 0.5, 1.0, 2.0)
COLUMNS = ("reward", "held_out_reward", "objects", "colors", "count", "seconds_per_image", "peak_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--schedules", nargs="+", default=["constant", "sigma"])
    args = parser.parse_args()

    pipe, reward = load_pipeline(), load_reward("clip")
    rewards = {"reward": reward, "held_out_reward": load_reward("clip", held_out=True)}
    estimators = {"stitched": load_value(pipe), "Tweedie": TweedieValue(pipe, reward)}
    methods = [Method("unguided", None)]
    for name, value in estimators.items():
        for schedule in args.schedules:
            for strength in args.strengths:
                methods.append(
                    Method(f"{name} {schedule} {strength:g}", value, {"strength": strength, "schedule": schedule})
                )

    prompts = held_out_prompts(args.prompts)
    chunk = 12
    with tqdm(total=len(methods) * -(-len(prompts) // chunk), desc="equal steps") as bar:
        results = compare_methods(
            pipe, methods, prompts, rewards, chunk=chunk, on_chunk=bar.update,
            num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
        )  # fmt: skip
    figures = {name: r.figures for name, r in results.items()}
    print(table(figures))

    best = {
        name: max((m for m in figures if m.startswith(name)), key=lambda m: figures[m]["held_out_reward"])
        for name in estimators
    }
    ratio = figures[best["Tweedie"]]["seconds_per_image"] / figures[best["stitched"]]["seconds_per_image"]
    by_name = {m.name: m for m in methods}
    more = Method("stitched, equal time", by_name[best["stitched"]].value, {
        **by_name[best["stitched"]].options, "num_inference_steps": round(args.steps * ratio)
    })  # fmt: skip
    base = Method("Tweedie, equal time", by_name[best["Tweedie"]].value, {
        **by_name[best["Tweedie"]].options, "num_inference_steps": args.steps
    })  # fmt: skip
    equal_time = compare_methods(pipe, [more, base], prompts, rewards, chunk=chunk, guidance_scale=args.guidance_scale)
    equal_figures = {name: r.figures for name, r in equal_time.items()}
    print(f"\nbest by held-out reward: {best}; Tweedie takes {ratio:.2f}x the time per image\n" + table(equal_figures))

    plain, guided = figures["unguided"]["seconds_per_image"], {n: figures[best[n]]["seconds_per_image"] for n in best}
    result = {
        "prompts": len(prompts),
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "equal_steps": figures,
        "best_by_held_out_reward": best,
        "time_ratio_tweedie_over_stitched": ratio,
        "time_ratio_of_the_guidance_part": (guided["Tweedie"] - plain) / (guided["stitched"] - plain),
        "equal_time": equal_figures,
    }
    print(f"wrote {save('guidance', result)}")
    plot(figures, args, RESULTS / "guidance.png")


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
            for schedule, style in zip(args.schedules, ("-", ":"), strict=False):
                rows = [figures[f"{name} {schedule} {s:g}"][key] for s in args.strengths]
                ax.plot(args.strengths, rows, style, color=color, marker="o", markersize=3, label=f"{name}, {schedule}")
        ax.set(title=title, xlabel="strength (relative to the velocity)", xscale="log")
        ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
