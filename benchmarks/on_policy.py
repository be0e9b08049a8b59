"""Latents to train on: of the forward process on real images, on generated ones, or of the generator's own rollouts?

    python benchmarks/on_policy.py

On the playground: three values from one closed-form stitch and the same number of steps, captions and images, compared
with Monte Carlo (rollouts of the sampler under the prompt, with guidance) at latents on the way of held-out rollouts
and at the same rollouts' ends, noised. Writes results/on_policy.json.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from stitchvm_ext import MonteCarloValue
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.bench.harness import save
from stitchvm_ext.data import TensorImages
from stitchvm_ext.evaluation import spearman
from stitchvm_ext.evaluation.noise_levels import add_noise
from stitchvm_ext.evaluation.report import rows_table
from stitchvm_ext.playground import load_pipeline, load_reward, world
from stitchvm_ext.playground.experiments import held_out_prompts, picture_tensor
from stitchvm_ext.playground.train import PICTURE_SEED
from stitchvm_ext.playground.train_value import CONFIG, PROBE_PICTURES
from stitchvm_ext.sampling.encoding import encode_condition
from stitchvm_ext.value import cache_rollouts, finetune, search_stitch
from stitchvm_ext.value.stitching import encode_probe, untrained_value
from stitchvm_ext.value.targets import cache_targets

TEXT_OPTIONS = {"max_sequence_length": 0}
SAMPLER = {"num_inference_steps": 20, "guidance_scale": 3.0}


def rollouts(pipe, reward, folder, prompts, states, seed):
    """Rollouts of SDE steps: their latents have the spread that Monte Carlo averages over."""
    options = {**SAMPLER, "transition": "flow_grpo", "states": states, "seed": seed, "text_options": TEXT_OPTIONS}
    return cache_rollouts(folder, pipe, reward, prompts, batch_size=64, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1600, help="captions, and images to train on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--latents", type=int, default=32, help="where Monte Carlo is asked, per kind and noise level")
    parser.add_argument("--rollouts", type=int, default=12, help="per latent")
    args = parser.parse_args()

    torch.set_num_threads(1)
    pipe, reward = load_pipeline(), load_reward("clip")
    backbone = backbone_of(pipe)
    null = backbone.null_condition(pipe, **TEXT_OPTIONS)
    pictures = world.dataset(args.images + PROBE_PICTURES, PICTURE_SEED)
    images, captions = picture_tensor(pictures), [p.caption for p in pictures[: args.images]]
    probe, latents = encode_probe(pipe, TensorImages(images[-PROBE_PICTURES:]), PROBE_PICTURES)
    search = search_stitch(backbone, reward, latents, probe, null)
    pick = (search, search.best.depth, search.best.layer, tuple(latents.shape[-2:]), null, TEXT_OPTIONS)

    with tempfile.TemporaryDirectory() as scratch:
        own = rollouts(pipe, reward, Path(scratch) / "rollouts", captions, states=4, seed=0)
        ends = own.batch(torch.arange(args.images))[0]
        with torch.no_grad():
            generated = torch.cat([backbone.decode_latents(pipe.vae, z).clamp(0, 1) for z in ends.split(64)])
        training = {
            "real images": cache_targets(Path(scratch) / "real", pipe, reward, images[: args.images]),
            "generated images": cache_targets(Path(scratch) / "generated", pipe, reward, generated),
            "rollouts": own,
        }
        config = replace(CONFIG, epochs=args.epochs)
        values = {}
        for name, targets in training.items():
            values[name] = untrained_value(pipe, reward, *pick)
            losses = finetune(values[name], reward, targets, config)
            print(name, {term: round(means[-1], 4) for term, means in losses.items()}, flush=True)
        prompts = held_out_prompts(args.latents)
        steps = SAMPLER["num_inference_steps"]
        held_out = rollouts(pipe, reward, Path(scratch) / "held-out", prompts, states=steps, seed=1)
        clean = held_out.batch(torch.arange(args.latents))[0]
        visited, levels = held_out.states(torch.arange(args.latents))
    order = levels.argsort(dim=1, descending=True)
    rows = torch.arange(args.latents)
    condition = encode_condition(pipe, backbone, prompts, [""] * len(prompts), SAMPLER["guidance_scale"], TEXT_OPTIONS)

    monte_carlo = MonteCarloValue(pipe, reward, args.rollouts, steps)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    tables = {"on the way": [], "noised ends": []}
    for place in (steps // 4, steps // 2, 3 * steps // 4):
        sigma = float(levels[0, order[0, place]])
        for kind, z in (
            ("on the way", visited[rows, order[:, place]]),
            ("noised ends", add_noise(clean, sigma, noise)),
        ):
            found = monte_carlo.rollout_rewards(z, sigma, condition)
            truth = found.mean(0)
            row = {
                "sigma": sigma,
                "spread": float(truth.std()),
                "standard_error": float(found.std(0).mean() / args.rollouts**0.5),
            }
            for name, value in values.items():
                with torch.no_grad():
                    estimate = value.value(z, sigma, condition)
                row[f"{name} spearman"] = spearman(estimate, truth)
                row[f"{name} rmse"] = float((estimate - truth).square().mean().sqrt())
            tables[kind].append(row)
    for kind, table in tables.items():
        print(f"\n{kind}\n{rows_table(table)}")
    print(f"wrote {save('on_policy', {'settings': vars(args), 'sampler': SAMPLER, 'against_monte_carlo': tables})}")


if __name__ == "__main__":
    main()
