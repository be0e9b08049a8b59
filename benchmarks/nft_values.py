"""Does DiffusionNFT learn faster from a better value? The stitched runs of alignment.py with others in its place.

    python benchmarks/nft_values.py --value prompted_values/rollouts

``exact`` is the clean reward at the end of the frozen generator's ODE from where a sample stopped, which a stitched
value estimates; it costs the steps that stopping saves. ``--value`` is another stitched value. Settings, seeds, prompts
and stops are those of alignment.py, whose results/alignment.json has the runs to compare with. A run that was stopped
goes on; ``--runs`` makes some of them, and the call without it collects all. Writes results/nft_values.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from alignment import SEEDS, TRAINERS, run

from stitchvm_ext import MonteCarloValue, StitchedValue
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.playground import load_pipeline, load_reward

MEASURES = ("target_reward", "held_out_reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--value", type=Path, required=True, help="folder of a stitched value")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help='make these runs, "exact" or the folder\'s name')
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--work", type=Path, default=Path("alignment_runs"), help="folder of the runs")
    args = parser.parse_args()
    args.prompts, args.eval_prompts = 256, 64

    names = ("exact", args.value.name)
    if set(args.runs or ()) - set(names):
        parser.error(f"--runs: expected some of {', '.join(names)}, got {', '.join(args.runs)}")
    runs = [
        {"value": name, "seed": seed, "curve": train(name, seed, args)}
        for seed in args.seeds
        for name in args.runs or names
    ]
    if args.runs:
        return
    known = json.loads((RESULTS / "alignment.json").read_text())["runs"]
    gains = {
        (one["value"], one["seed"]): [one["curve"][-1][m] - one["curve"][0][m] for m in MEASURES]
        for one in [*runs, *(one for one in known if one["method"] == "nft")]
    }
    for name in (*names, "stitched"):
        for other in ("clean", "stitched"):
            if name != other:
                print(f"{name} over {other}: {describe(gains, name, other, args.seeds)}")
    print(f"wrote {save('nft_values', {'runs': runs})}")


def train(name: str, seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    trainer_class, config = TRAINERS["nft stitched"]
    pipe = load_pipeline()
    if name == "exact":
        steps = config.num_inference_steps
        value = MonteCarloValue(pipe, load_reward("clip"), num_rollouts=1, num_steps=steps, transition="ode")
    else:
        value = StitchedValue.from_pretrained(args.value, pipe)
    return run(trainer_class, config, pipe, value, f"nft {name}", seed, args)


def describe(gains: dict[tuple[str, int], list[float]], name: str, other: str, seeds: list[int]) -> str:
    """How much more one value's runs gained than another's from the same seeds."""
    found = []
    for position, measure in enumerate(MEASURES):
        more = [gains[name, seed][position] - gains[other, seed][position] for seed in seeds]
        error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else float("nan")
        found.append(f"{measure} {statistics.mean(more):+.4f} +- {error:.4f}")
    return ", ".join(found)


if __name__ == "__main__":
    main()
