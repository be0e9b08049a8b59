"""How accurate is a value on noisy latents? Stitched, VAE-only stitch and Tweedie against the clean reward and Monte
Carlo.

    python benchmarks/noise_levels.py

Held-out pictures of the playground; writes results/noise_levels.json and noise_levels.png.
"""

from __future__ import annotations

import argparse

import torch

from stitchvm_ext import MonteCarloValue, TweedieValue
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.evaluation import SIGMAS, retrieval_at_1, spearman
from stitchvm_ext.evaluation.report import plot_curves, rows_table
from stitchvm_ext.playground import load_pipeline, load_reward, load_value
from stitchvm_ext.playground.demo import PANELS
from stitchvm_ext.playground.experiments import held_out, noise_level_accuracy, noisy_latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="held-out pictures")
    parser.add_argument("--monte-carlo-latents", type=int, default=24)
    parser.add_argument("--rollouts", type=int, default=16, help="rollouts per latent")
    args = parser.parse_args()

    pipe, reward = load_pipeline(), load_reward("clip")
    head = load_reward("aesthetic").head
    estimators = {
        "stitched": load_value(pipe),
        "VAE-only stitch": load_value(pipe, vae_only=True),
        "Tweedie": TweedieValue(pipe, reward),
    }
    data = held_out(pipe, reward, args.images)
    accuracy = {}
    for name, estimator in estimators.items():
        accuracy[name] = noise_level_accuracy(estimator, data, head)
        print(f"\n{name}\n" + rows_table(accuracy[name]), flush=True)

    monte_carlo = MonteCarloValue(pipe, reward, args.rollouts)
    count = args.monte_carlo_latents
    condition = data.pairs.rows(slice(0, count))
    rows = []
    for sigma in SIGMAS:
        z = noisy_latents(data.latents[:count], sigma)
        with torch.no_grad():
            rollouts = monte_carlo.rollout_rewards(z, sigma, condition)
            truth = rollouts.mean(0)
            row = {"sigma": sigma, "standard_error": (rollouts.std(0) / args.rollouts**0.5).mean().item()}
            row["spread"] = truth.std().item()
            for name, estimator in estimators.items():
                value = estimator.value(z, sigma, condition)
                row[f"{name} spearman"] = spearman(value, truth)
                row[f"{name} rmse"] = (value - truth).square().mean().sqrt().item()
        rows.append(row)
    print(f"\nagainst Monte Carlo ({count} latents x {args.rollouts} rollouts)\n" + rows_table(rows))

    result = {
        "images": args.images,
        "clean_r_at_1": retrieval_at_1(data.embeddings, data.texts, data.own_texts),
        "accuracy": accuracy,
        "monte_carlo": {"latents": count, "rollouts": args.rollouts, "rows": rows},
    }
    print(f"\nclean reward's own R@1: {result['clean_r_at_1']:.3f}\nwrote {save('noise_levels', result)}")
    plot_curves(accuracy, PANELS, RESULTS / "noise_levels.png")


if __name__ == "__main__":
    main()
