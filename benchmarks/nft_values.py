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
from report import seed_by_seed

from stitchvm_ext import MonteCarloValue, StitchedValue
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.bench.pages import alignment_table, mean_of
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
    result = {"runs": others + runs}
    pairs = [(("nft", name), ("nft", "clean")) for name in (*names, "stitched")]
    print("\n".join([*alignment_table(result), "", *seed_by_seed(result, pairs), "", *short_of_clean(result)]))
    print(f"wrote {save('nft_values', result)}")


def train(name: str, seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    trainer_class, config = TRAINERS["nft stitched"]
    pipe = load_pipeline()
    if name == "exact":
        steps = config.num_inference_steps
        value = MonteCarloValue(pipe, load_reward("clip"), num_rollouts=1, num_steps=steps, transition="ode")
    else:
        value = StitchedValue.from_pretrained(args.value, pipe)
    return run(trainer_class, config, pipe, value, f"nft {name}", seed, args)


def short_of_clean(result: dict[str, Any]) -> list[str]:
    """Per value: at the paper's share of the clean runs' time, how far below their end in the held-out reward."""
    curves = {(run["value"], run["seed"]): run["curve"] for run in result["runs"]}
    ends = {seed: curve[-1] for (value, seed), curve in curves.items() if value == "clean"}
    allowed = PAPER * statistics.mean(end["seconds"] for end in ends.values())
    short: dict[str, list[float]] = {}
    for (value, seed), curve in curves.items():
        reached = [point["held_out_reward"] for point in curve if point["seconds"] <= allowed][-1]
        short.setdefault(value, []).append(ends[seed]["held_out_reward"] - reached)
    return [f"{value}: after {allowed:.0f} s {mean_of(of, 4)} below the clean runs' end" for value, of in short.items()]


if __name__ == "__main__":
    main()
