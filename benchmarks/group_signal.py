"""What can a value tell apart among samples of one prompt? Rollouts, each valued after every step.

    python benchmarks/group_signal.py
    python benchmarks/group_signal.py --transition linear_sde --guidance-scale 3 --steps 20

DiffusionNFT and DPO compare samples of a prompt with each other, so that is the part of a value that trains them. Per
step the correlation, within prompts, of the stitched and of Tweedie's value with the clean reward that the sample ends
with; writes results/group_signal.json. The second call has rollouts as inference_methods.py has them, with noise and
guidance; writes results/group_signal_linear_sde.json.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from stitchvm_ext import StitchedValue, TweedieValue
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.bench.harness import save
from stitchvm_ext.playground import load_pipeline, load_reward, load_value
from stitchvm_ext.playground.experiments import held_out_prompts
from stitchvm_ext.sampling import get_transition, pipeline_sigmas
from stitchvm_ext.sampling.encoding import encode_condition
from stitchvm_ext.training import CleanReward


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--group-size", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--transition", choices=("ode", "linear_sde"), default="ode")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--values", type=Path, nargs="*", default=[], help="folders of other stitched values")
    args = parser.parse_args()

    pipe, reward = load_pipeline(), load_reward("clip")
    estimators = {"stitched": load_value(pipe), "Tweedie": TweedieValue(pipe, reward)}
    estimators |= {folder.name: StitchedValue.from_pretrained(folder, pipe) for folder in args.values}
    backbone, step = backbone_of(pipe), get_transition(args.transition)
    sigmas = pipeline_sigmas(pipe, backbone, args.steps, (16, 16)).tolist()
    values = {name: torch.empty(args.steps, args.prompts, args.group_size) for name in estimators}
    final = torch.empty(args.prompts, args.group_size)
    for number, prompt in enumerate(held_out_prompts(args.prompts)):
        prompts = [prompt] * args.group_size
        text = estimators["stitched"].text_options
        condition = encode_condition(pipe, backbone, prompts, [""] * len(prompts), args.guidance_scale, text)
        generator = torch.Generator().manual_seed(number)
        latents = torch.randn(args.group_size, 4, 16, 16, generator=generator)
        for k, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            velocity = backbone.guided_velocity(latents, sigma, condition).float()
            noise = torch.randn(latents.shape, generator=generator)
            latents = step(latents, velocity, sigma, after, noise)
            for name, value in estimators.items():
                values[name][k, number] = value.value(latents, after, condition)
        final[number] = CleanReward(pipe, reward).value(latents, 0.0, condition)
    rows = []
    for k, sigma in enumerate(sigmas[1:]):
        rows.append({"step": k + 1, "sigma": sigma} | {n: correlation_within(v[k], final) for n, v in values.items()})
        print(
            f"step {k + 1:2d}, sigma {sigma:.3f}: " + ", ".join(f"{n} {rows[-1][n]:+.2f}" for n in values), flush=True
        )
    settings = {k: getattr(args, k) for k in ("prompts", "group_size", "steps", "guidance_scale", "transition")}
    name = "group_signal" if args.transition == "ode" else f"group_signal_{args.transition}"
    print(f"wrote {save(name, settings | {'rows': rows})}")


def correlation_within(values: torch.Tensor, final: torch.Tensor) -> float:
    """Of deviations from each prompt's mean, [prompts, group] each."""
    a, b = (t - t.mean(1, keepdim=True) for t in (values, final))
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


if __name__ == "__main__":
    main()
