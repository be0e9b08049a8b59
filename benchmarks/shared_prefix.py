"""What sharing the backbone's prefix with the unconditional branch changes: nothing but the cost.

    python benchmarks/shared_prefix.py

Plain classifier-free guidance, StitchVM-DPS with the shared prefix, and the same with a prefix of its own, alternating
over the same prompts and seeds; writes results/shared_prefix.json.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from stitchvm_ext import ValueEstimator, guided_sample
from stitchvm_ext.bench.harness import save
from stitchvm_ext.playground import load_pipeline, load_value
from stitchvm_ext.playground.experiments import held_out_prompts
from stitchvm_ext.sampling.encoding import encode_condition


class SeparatePrefix(ValueEstimator):
    """A stitched value that runs its own prefix: the interface's plain ``branches_with_value``."""

    def __init__(self, stitched):
        self.stitched, self.backbone, self.text_options = stitched, stitched.backbone, stitched.text_options

    def value(self, latents, sigma, condition):
        return self.stitched.value(latents, sigma, condition)


def one_step(pipe, shared: ValueEstimator, separate: ValueEstimator, prompts: list[str]) -> dict[str, float]:
    """Largest differences of one step's velocity, value and gradient, relative to the largest entry of each."""
    condition = encode_condition(pipe, shared.backbone, prompts, [""] * len(prompts), 3.0, shared.text_options)
    latents = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    worst = dict.fromkeys(("velocity", "value", "gradient"), 0.0)
    for sigma in (0.9, 0.5, 0.1):
        with shared.backbone.fused():  # as in guided_sample
            ours, theirs = (v.denoise_with_value(latents, sigma, condition) for v in (shared, separate))
        for name, a, b in zip(worst, ours, theirs, strict=True):
            worst[name] = max(worst[name], ((a - b).abs().max() / b.abs().max()).item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    pipe = load_pipeline()
    stitched = load_value(pipe)
    values = {"plain": None, "shared": stitched, "separate": SeparatePrefix(stitched)}
    prompts = held_out_prompts(args.prompts)
    seconds: dict[str, list[float]] = {name: [] for name in values}
    outputs = {}
    for _ in range(args.repeats):
        for name, value in values.items():
            generators = [torch.Generator().manual_seed(k) for k in range(args.prompts)]
            outputs[name] = guided_sample(
                pipe, value, prompts, num_inference_steps=args.steps, guidance_scale=3.0, strength=0.5,
                generator=generators, output_type="pt", progress=False,
            )  # fmt: skip
            seconds[name].append(outputs[name].timings["sample"] / args.prompts)
    shared, separate = outputs["shared"], outputs["separate"]
    result = {
        "prompts": args.prompts,
        "steps": args.steps,
        "depth": stitched.depth,
        "backbone_depth": stitched.backbone.depth,
        "denoiser_evaluations_per_image": {n: o.evaluations.denoiser / args.prompts for n, o in outputs.items()},
        "seconds_per_image": {name: statistics.median(times) for name, times in seconds.items()},
        "largest_relative_difference_of_one_step": one_step(pipe, stitched, values["separate"], prompts),
        "largest_difference_after_all_steps": {
            "images": (shared.images - separate.images).abs().max().item(),
            "values": (shared.values - separate.values).abs().max().item(),
        },
    }
    for name in values:
        evaluations, median = result["denoiser_evaluations_per_image"][name], result["seconds_per_image"][name]
        print(f"{name:>9}: {evaluations:6.2f} transformer passes and {median:.3f} s per image")
    step, end = result["largest_relative_difference_of_one_step"], result["largest_difference_after_all_steps"]
    print("one step, shared against separate: " + ", ".join(f"{n} within {d:.1e}" for n, d in step.items()))
    print(f"after {args.steps} steps: images within {end['images']:.1e}, values within {end['values']:.1e}")
    print(f"wrote {save('shared_prefix', result)}")


if __name__ == "__main__":
    main()
