"""What can a value choose between? Eight proposals at each step of plain trajectories, valued by both estimators.

    python benchmarks/proposal_spread.py

Per noise level the standard deviation of the stitched and of Tweedie's value among a latent's proposals, and the
correlation between the two; writes results/proposal_spread.json.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from stitchvm_ext import TweedieValue
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.bench.harness import save
from stitchvm_ext.playground import load_pipeline, load_reward, load_value
from stitchvm_ext.playground.experiments import held_out_prompts
from stitchvm_ext.sampling import get_transition, pipeline_sigmas
from stitchvm_ext.sampling.encoding import encode_condition


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--proposals", type=int, default=8)
    args = parser.parse_args()

    pipe = load_pipeline()
    estimators = {"stitched": load_value(pipe), "Tweedie": TweedieValue(pipe, load_reward("clip"))}
    backbone, prompts = backbone_of(pipe), held_out_prompts(args.prompts)
    text = estimators["stitched"].text_options
    condition = encode_condition(pipe, backbone, prompts, [""] * len(prompts), 3.0, text)
    sigmas, step = pipeline_sigmas(pipe, backbone, 20, (16, 16)).tolist(), get_transition("linear_sde")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(prompts), 4, 16, 16, generator=generator)
    rows = []
    for sigma, after in itertools.pairwise(sigmas[:-1]):
        velocity = backbone.guided_velocity(latents, sigma, condition).float()
        noises = [torch.randn(latents.shape, generator=generator) for _ in range(args.proposals)]
        proposals = [step(latents, velocity, sigma, after, noise) for noise in noises]
        apart = {}
        for name, value in estimators.items():
            values = torch.stack([value.value(z, after, condition) for z in proposals])
            apart[name] = values - values.mean(0)
        correlation = torch.cosine_similarity(*(a.flatten() for a in apart.values()), dim=0).item()
        spread = {name: (a.square().sum() / (a.numel() - len(prompts))).sqrt().item() for name, a in apart.items()}
        rows.append({"sigma": after, **spread, "correlation": correlation})
        print(f"sigma {after:.3f}  spread: stitched {spread['stitched']:.4f}, Tweedie {spread['Tweedie']:.4f}; "
              f"correlation {correlation:+.2f}", flush=True)  # fmt: skip
        latents = proposals[0]
    print(f"wrote {save('proposal_spread', {'prompts': args.prompts, 'proposals': args.proposals, 'rows': rows})}")


if __name__ == "__main__":
    main()
