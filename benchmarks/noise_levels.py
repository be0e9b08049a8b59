"""How accurate is a value on noisy latents? Stitched, VAE-only stitch and Tweedie against the clean reward and Monte
Carlo.

    python benchmarks/noise_levels.py

Held-out pictures of the playground; writes results/noise_levels.json and noise_levels.png.
"""

from __future__ import annotations

import argparse

import torch
from harness import RESULTS, save

from stitchvm_ext import MonteCarloValue, TweedieValue
from stitchvm_ext.playground import load_pipeline, load_reward, load_value
from stitchvm_ext.playground.demo import plot_accuracy
from stitchvm_ext.playground.experiments import SIGMAS, held_out, noise_level_accuracy, noisy_latents, spearman


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
        print(f"\n{name}\n" + table(accuracy[name]), flush=True)

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
    print(f"\nagainst Monte Carlo ({count} latents x {args.rollouts} rollouts)\n" + table(rows))

    result = {
        "images": args.images,
        "clean_r_at_1": noise_level_clean(data),
        "accuracy": accuracy,
        "monte_carlo": {"latents": count, "rollouts": args.rollouts, "rows": rows},
    }
    print(f"\nclean reward's own R@1: {result['clean_r_at_1']:.3f}\nwrote {save('noise_levels', result)}")
    plot_accuracy(accuracy, RESULTS / "noise_levels.png")


def noise_level_clean(data) -> float:
    """R@1 of the clean reward itself."""
    from stitchvm_ext.playground.experiments import retrieval_at_1

    return retrieval_at_1(data.embeddings, data.texts, data.captions)


def table(rows: list[dict[str, float]]) -> str:
    """Rows with a common header, three decimals."""
    names = list(rows[0])
    widths = [max(len(n), 7) for n in names]
    lines = ["  ".join(n.rjust(w) for n, w in zip(names, widths, strict=True))]
    lines += ["  ".join(f"{row[n]:.3f}".rjust(w) for n, w in zip(names, widths, strict=True)) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
