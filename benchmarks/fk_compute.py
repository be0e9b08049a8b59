"""At what share of FK-Tweedie's compute does FK steering with proposals have its reward?

    python benchmarks/fk_compute.py --value prompted_values/captions

FK-Tweedie at doubling numbers of particles, and two particles with four proposals under a stitched value, on the
prompts, seeds and settings of inference_methods.py. Compute is passes of the denoiser, a value's prefix counted by its
share of the blocks. FK-Tweedie's reward between two of its runs is read off the line over the logarithm of the passes.
An interrupted run goes on. Writes results/fk_compute.json.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from inference_methods import SDE, USED_FOR_CHOOSING

from stitchvm_ext import StitchedValue, TweedieValue
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.evaluation import Contender, compare
from stitchvm_ext.playground import load_pipeline, load_reward
from stitchvm_ext.playground.experiments import checker_measures, held_out_prompts

STEPS, GUIDANCE_SCALE = 20, 3.0
# Chosen on captions for choosing; in the first two steps the value can tell little apart.
PROPOSALS = {"num_particles": 2, "num_proposals": 4, "proposal_window": (0.1, 0.7)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--value", type=Path, required=True, help="folder of a stitched value")
    parser.add_argument("--particles", type=int, nargs="+", default=[4, 8], help="of FK-Tweedie, from few to many")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()

    pipe, reward = load_pipeline(), load_reward("clip")
    rewards = {"reward": reward, "held_out_reward": load_reward("clip", held_out=True)}
    tweedie, stitched = TweedieValue(pipe, reward), StitchedValue.from_pretrained(args.value, pipe)
    options = {"method": "fk", "reward": reward, **SDE}
    baselines = [Contender(f"FK-Tweedie ({n})", tweedie, {**options, "num_particles": n}) for n in args.particles]
    ours = Contender(f"FK-{args.value.name} (2, 4)", stitched, {**options, **PROPOSALS})
    found = compare(
        pipe, [*baselines, ours], held_out_prompts(USED_FOR_CHOOSING + args.prompts)[USED_FOR_CHOOSING:], rewards,
        images_per_prompt=args.seeds, prompts_per_batch=16, measures=checker_measures,
        work_dir=RESULTS.parent / ".fk_compute", num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE,
        batch_size=64,
    )  # fmt: skip
    print(found.table())
    passes = {name: figures["evaluations_per_image"]["denoiser"] for name, figures in found.figures.items()}
    shares = {}
    for measure in rewards:
        means = {name: figures["means"][measure] for name, figures in found.figures.items()}
        needed = passes_needed([(passes[c.name], means[c.name]) for c in baselines], means[ours.name])
        shares[measure] = needed and passes[ours.name] / needed
        print(f"{measure}: {'out of range' if needed is None else f'{shares[measure]:.2f} of the passes'}")
    settings = {"prompts": args.prompts, "seeds": args.seeds, "steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
    settings |= {"proposals": PROPOSALS, "share": shares}
    print(f"wrote {save('fk_compute', {**settings, 'methods': found.figures})}")


def passes_needed(curve: list[tuple[float, float]], reward: float) -> float | None:
    """Passes at which a curve of (passes, reward) reaches this reward; None where it lies beyond its ends."""
    for (few, low), (many, high) in zip(curve[:-1], curve[1:], strict=True):
        if low <= reward <= high:
            return math.exp(math.log(few) + (reward - low) / (high - low) * math.log(many / few))
    return None


if __name__ == "__main__":
    main()
