"""Does DiffusionNFT learn faster from a better value? The stitched runs of alignment.py with others in its place.

    python benchmarks/nft_values.py --value prompted_values/rollouts

``exact`` is the clean reward at the end of the frozen generator's ODE from where a sample stopped, which a stitched
value estimates; it costs the steps that stopping saves. ``--value`` is another stitched value. Settings, seeds, prompts
and stops are alignment.py's, whose runs with the clean reward and the stitched value are taken from its result. A run
that was stopped goes on; ``--runs`` makes some of them, and the call without it collects all. Writes
results/nft_values.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from alignment import EVAL_PROMPTS, PROMPTS, SEEDS, TRAINERS, run

from stitchvm_ext import MonteCarloValue, StitchedValue
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.bench.pages import clean_nft_reaches, curves_of, mean_of, seconds_until
from stitchvm_ext.playground import load_pipeline, load_reward

PAPER = 1 / 2.3  # of the clean run's time to its reward, as the paper reports for DiffusionNFT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--value", type=Path, required=True, help="folder of a stitched value")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help='make these runs, "exact" or the folder\'s name')
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--work", type=Path, default=Path("alignment_runs"), help="folder of the runs")
    args = parser.parse_args()
    args.prompts, args.eval_prompts = PROMPTS, EVAL_PROMPTS

    names = ("exact", args.value.name)
    if set(args.runs or ()) - set(names):
        parser.error(f"--runs: expected some of {', '.join(names)}, got {', '.join(args.runs)}")
    runs = [
        {"method": "nft", "value": name, "seed": seed, "curve": train(name, seed, args)}
        for seed in args.seeds
        for name in args.runs or names
    ]
    if args.runs:
        return
    known = json.loads((RESULTS / "alignment.json").read_text())["runs"]
    others = [one for one in known if one["method"] == "nft" and one["seed"] in args.seeds]
    print("\n".join(describe(others + runs)))
    print(f"wrote {save('nft_values', {'runs': others + runs})}")


def train(name: str, seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    trainer_class, config = TRAINERS["nft stitched"]
    pipe = load_pipeline()
    if name == "exact":
        steps = config.num_inference_steps
        value = MonteCarloValue(pipe, load_reward("clip"), num_rollouts=1, num_steps=steps, transition="ode")
    else:
        value = StitchedValue.from_pretrained(args.value, pipe)
    return run(trainer_class, config, pipe, value, f"nft {name}", seed, args)


def describe(runs: list[dict[str, Any]]) -> list[str]:
    """Per value: what its runs gained, how much more than clean ones of the same seeds did, when their mean is at the
    clean ones' end, and how far from it they are at the paper's share of the clean runs' time.
    """
    goal = clean_nft_reaches({"runs": runs})
    found = {value: curves for (_, value), curves in curves_of({"runs": runs}).items()}
    allowed = statistics.mean(c[-1]["seconds"] for c in found["clean"]) * PAPER
    lines = []
    for value, curves in found.items():
        pairs = list(zip(curves, found["clean"], strict=True))  # of one seed
        lines.append(f"{value}, {statistics.mean(c[-1]['seconds'] for c in curves):.0f} s")
        for measure in ("target_reward", "held_out_reward"):
            gains = [c[-1][measure] - c[0][measure] for c in curves]
            more = [a[-1][measure] - b[-1][measure] for a, b in pairs]
            lines.append(f"  {measure}: gained {mean_of(gains, 4)}, over clean {mean_of(more, 4)}")
        until = seconds_until(curves, goal)
        within = [([point for point in a if point["seconds"] <= allowed][-1], b[-1]) for a, b in pairs]
        over = [a["held_out_reward"] - b["held_out_reward"] for a, b in within]
        lines.append(
            f"  at the clean runs' last held-out reward: {'never' if until is None else f'after {until:.0f} s'}; "
            f"over it in {allowed:.0f} s: {mean_of(over, 4)}"
        )
    return lines


if __name__ == "__main__":
    main()
