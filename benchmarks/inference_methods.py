"""Reward against denoiser evaluations: best-of-N, FK steering and DPS, with Tweedie's value and the stitched one.

    python benchmarks/inference_methods.py

Held-out prompts that no setting was chosen on, several seeds each. Target reward, held-out reward, exact checker and a
diversity measure (mean distance between the seeds' pictures of one prompt in the held-out reward's embedding), with
standard errors over prompts; evaluations of the networks as :func:`guided_sample` counts them. Every method's rows are
kept as they are done, so that an interrupted run goes on. Writes results/inference_methods.json and .png.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

from stitchvm_ext import TweedieValue, guided_sample
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.playground import load_pipeline, load_reward, load_value, world
from stitchvm_ext.playground.experiments import held_out_prompts

USED_FOR_CHOOSING = 96  # the first held-out captions: settings were chosen on them
SDE = {"transition": "linear_sde"}
PROPOSALS = {"num_proposals": 2, "proposal_window": (0.2, 0.6)}  # where the value can tell pictures apart
METHODS = {
    "unguided, ODE": ("dps", None, {}),
    "unguided": ("dps", None, SDE),
    "best of 2": ("best_of_n", None, {"num_particles": 2, **SDE}),
    "best of 4": ("best_of_n", None, {"num_particles": 4, **SDE}),
    "best of 8": ("best_of_n", None, {"num_particles": 8, **SDE}),
    "best of 8, stitched keeps 2 at 50%": ("best_of_n", "stitched", {"num_particles": 8, "keep": ((0.5, 2),), **SDE}),
    "FK-Tweedie (2)": ("fk", "Tweedie", {"num_particles": 2, **SDE}),
    "FK-Tweedie (4)": ("fk", "Tweedie", {"num_particles": 4, **SDE}),
    "FK-stitched (2, 1)": ("fk", "stitched", {"num_particles": 2, **SDE}),
    "FK-stitched (2, 2)": ("fk", "stitched", {"num_particles": 2, **PROPOSALS, **SDE}),
    "FK-stitched (4, 1)": ("fk", "stitched", {"num_particles": 4, **SDE}),
    "FK-stitched (4, 2)": ("fk", "stitched", {"num_particles": 4, **PROPOSALS, **SDE}),
    "DPS-Tweedie, sigma 2": ("dps", "Tweedie", {"strength": 2.0, "schedule": "sigma"}),
    "DPS-stitched, sigma 2": ("dps", "stitched", {"strength": 2.0, "schedule": "sigma"}),
    "DPS-stitched, constant 0.25": ("dps", "stitched", {"strength": 0.25}),
}
COLUMNS = ("reward", "held_out_reward", "objects", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=64, help="latents at a time")
    args = parser.parse_args()

    pipe, reward, held_out = load_pipeline(), load_reward("clip"), load_reward("clip", held_out=True)
    values = {None: None, "stitched": load_value(pipe), "Tweedie": TweedieValue(pipe, reward)}
    prompts = held_out_prompts(USED_FOR_CHOOSING + args.prompts)[USED_FOR_CHOOSING:]
    texts = [p for p in prompts for _ in range(args.seeds)]
    shelf = RESULTS.parent / ".inference_methods"
    shelf.mkdir(exist_ok=True)
    rows = {}
    for number, (name, (method, value, options)) in enumerate(tqdm(METHODS.items(), desc="methods")):
        kept = shelf / f"{number:02d}-{args.prompts}x{args.seeds}x{args.steps}.pt"
        if kept.exists():
            rows[name] = torch.load(kept, weights_only=True)
            continue
        began = time.perf_counter()
        result = guided_sample(
            pipe, values[value], texts, method=method, reward=reward if method != "dps" else None,
            num_inference_steps=args.steps, guidance_scale=args.guidance_scale, batch_size=args.batch_size,
            generator=[torch.Generator().manual_seed(k) for k in range(len(texts))], output_type="pt",
            progress=False, **options,
        )  # fmt: skip
        seconds = (time.perf_counter() - began) / len(texts)
        row = figures(result.images, texts, args.seeds, reward, held_out)
        counts = {kind: n / len(texts) for kind, n in asdict(result.evaluations).items()}
        rows[name] = row | {"evaluations_per_image": counts, "seconds_per_image": seconds}
        torch.save(rows[name], kept)
    settings = {k: getattr(args, k) for k in ("prompts", "seeds", "steps", "guidance_scale")}
    path = save("inference_methods", {**settings, "methods": rows})
    print(f"\n{table(rows)}\n\nwrote {path}")
    plot(rows, path.with_suffix(".png"))


@torch.no_grad()
def figures(images, texts: list[str], seeds: int, reward, held_out) -> dict[str, dict[str, float]]:
    """Mean and standard error over prompts of each measure."""

    def score(model):
        parts = [model(x, texts[64 * k : 64 * k + len(x)]) for k, x in enumerate(images.split(64))]
        return torch.cat(parts)

    pixels = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    right = [world.check(image, text).objects for image, text in zip(pixels, texts, strict=True)]
    embedding = torch.cat([held_out.output(x).normalized for x in images.split(64)])
    embedding = embedding.view(-1, seeds, embedding.shape[-1])
    similarity = embedding @ embedding.mT
    diversity = 1 - (similarity.sum((1, 2)) - seeds) / (seeds * (seeds - 1))
    of_image = {
        "reward": score(reward),
        "held_out_reward": score(held_out),
        "objects": torch.tensor(right, dtype=torch.float32),
    }
    of_prompt = {name: x.view(-1, seeds).mean(1) for name, x in of_image.items()} | {"diversity": diversity}
    return {
        name: {"mean": x.mean().item(), "standard_error": (x.std() / len(x) ** 0.5).item()}
        for name, x in of_prompt.items()
    }


def table(rows: dict) -> str:
    width = max(map(len, rows))
    kinds = ("denoiser", "prefix", "value", "decoder")
    lines = [" " * width + "".join(c.rjust(18) for c in COLUMNS) + "".join(k.rjust(10) for k in kinds) + "   s/image"]
    for name, row in rows.items():
        cells = [f"{row[c]['mean']:.3f} ± {row[c]['standard_error']:.3f}".rjust(18) for c in COLUMNS]
        counts = [f"{row['evaluations_per_image'][k]:10.1f}" for k in kinds]
        lines.append(name.ljust(width) + "".join(cells) + "".join(counts) + f"{row['seconds_per_image']:10.2f}")
    return "\n".join(lines)


def plot(rows: dict, path) -> None:
    """Target and held-out reward against denoiser evaluations per image."""
    from matplotlib.figure import Figure

    families = {"unguided": "grey", "best": "tab:green", "FK-T": "tab:orange", "FK-s": "tab:blue"}
    families |= {"DPS-T": "tab:red", "DPS-s": "tab:purple"}
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for ax, key in zip(figure.subplots(1, 2), ("reward", "held_out_reward"), strict=True):
        for name, row in rows.items():
            color = next(c for start, c in families.items() if name.startswith(start))
            x, y = row["evaluations_per_image"]["denoiser"], row[key]
            ax.errorbar(x, y["mean"], y["standard_error"], fmt="o", color=color, capsize=3)
            ax.annotate(name, (x, y["mean"]), fontsize=6, xytext=(4, 3), textcoords="offset points")
        ax.set(xlabel="forward passes of the denoiser per image", ylabel=key.replace("_", " "), xscale="log")
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
