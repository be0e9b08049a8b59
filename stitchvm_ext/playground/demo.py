"""`stitchvm demo`: the embedded model steered by a reward, in pictures and numbers."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..evaluation.compare import Contender
from ..evaluation.report import plot_curves
from ..value import TweedieValue
from . import load_pipeline, load_reward, load_value
from .experiments import MethodResult, compare_methods, held_out, held_out_prompts, noise_level_accuracy

GUIDANCE_SCALE = 3.0
STRENGTH = 0.25  # near both methods' best constant strength in the sweep of benchmarks/guidance.py
ACCURACY_SIGMAS = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
PANELS = {"spearman": "rank correlation with the clean reward", "r_at_1": "image-to-text retrieval R@1"}


def run_demo(
    out: Path, num_prompts: int = 12, num_inference_steps: int = 20, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Run the demo into a folder: grid.png, value_accuracy.png, results.json. Returns the table's figures by method."""
    if num_prompts < 1:
        raise ValueError(f"prompts: expected at least 1, got {num_prompts}")
    if num_inference_steps < 1:
        raise ValueError(f"steps: expected at least 1, got {num_inference_steps}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    print("Loading the embedded text-to-image model, its rewards and the stitched value models ...")
    pipe, reward, other = load_pipeline(), load_reward("clip"), load_reward("clip", held_out=True)
    stitched, vae_only, tweedie = load_value(pipe), load_value(pipe, vae_only=True), TweedieValue(pipe, reward)
    methods = [
        Contender("unguided", None),
        Contender("Tweedie-DPS", tweedie, {"strength": STRENGTH}),
        Contender("StitchVM-DPS", stitched, {"strength": STRENGTH}),
    ]
    prompts = held_out_prompts(num_prompts)
    chunk = 6
    total = len(methods) * -(-num_prompts // chunk)
    with tqdm(total=total, desc="sampling") as bar:
        results = compare_methods(
            pipe, methods, prompts, {"reward": reward, "held_out_reward": other}, chunk=chunk, seed=seed,
            on_chunk=bar.update, num_inference_steps=num_inference_steps, guidance_scale=GUIDANCE_SCALE,
        )  # fmt: skip
    figures = {name: r.figures for name, r in results.items()}
    print("\n" + table(figures))

    data = held_out(pipe, reward, 192)
    curves = {
        name: noise_level_accuracy(estimator, data, sigmas=ACCURACY_SIGMAS)
        for name, estimator in tqdm(
            {"stitched": stitched, "VAE-only stitch": vae_only, "Tweedie": tweedie}.items(), desc="value accuracy"
        )
    }
    save_grid(results, prompts, out / "grid.png")
    plot_curves(curves, PANELS, out / "value_accuracy.png")
    partial = out / "results.json.partial"
    partial.write_text(json.dumps({"prompts": prompts, "methods": figures, "value_accuracy": curves}, indent=1))
    partial.replace(out / "results.json")
    seconds = time.perf_counter() - began
    print(f"\nWrote grid.png, value_accuracy.png and results.json into {out} in {seconds:.0f} s.")
    return figures


def table(figures: dict[str, dict[str, float]]) -> str:
    """The methods side by side."""
    columns = {"reward": 9, "held-out": 10, "objects": 9, "colours": 9, "count": 7, "s/image": 9, "peak MiB": 10}
    head = " " * 14 + "".join(f"{name:>{width}}" for name, width in columns.items())
    lines = [head, "-" * len(head)]
    for name, f in figures.items():
        lines.append(
            f"{name:<14}{f['reward']:>9.3f}{f['held_out_reward']:>10.3f}{f['objects']:>9.2f}{f['colors']:>9.2f}{f['count']:>7.2f}"
            f"{f['seconds_per_image']:>9.2f}{f['peak_bytes'] / 2**20:>10.0f}"
        )
    lines.append("reward: CLIP similarity, which guidance follows; held-out: another CLIP's, which it never sees;")
    lines.append(
        "objects, colours, count: share of pictures in which the exact checker finds what the prompt asks for."
    )
    return "\n".join(lines)


def save_grid(results: dict[str, MethodResult], prompts: list[str], path: Path) -> None:
    """One row of pictures per method, one column per prompt."""
    from matplotlib.figure import Figure

    columns = min(len(prompts), 12)
    figure = Figure(figsize=(1.25 * columns + 1.2, 1.25 * len(results) + 0.9), layout="constrained")
    axes = figure.subplots(len(results), columns, squeeze=False)
    for ax, prompt in zip(axes[0], prompts, strict=False):
        ax.set_title(prompt.replace(" and ", "\nand "), fontsize=6.5)
    for row, (name, result) in zip(axes, results.items(), strict=True):
        for ax, image in zip(row, result.images, strict=False):
            ax.imshow(_pixels(image))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row[0].set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=140)


def _pixels(image: Tensor):
    return image.clamp(0, 1).permute(1, 2, 0).numpy()
