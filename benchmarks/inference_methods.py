"""Reward against denoiser evaluations: best-of-N, FK steering and DPS, with Tweedie's value and the stitched one.

    python benchmarks/inference_methods.py
    python benchmarks/inference_methods.py --prompted prompted_values/captions prompted_values/rollouts
    python benchmarks/inference_methods.py --four-proposals prompted_values/captions

Held-out prompts that no setting was chosen on, several seeds each. Target reward, held-out reward, exact checker and a
diversity measure (mean distance between the seeds' pictures of one prompt in the held-out reward's embedding), with
standard errors over prompts; evaluations of the networks as :func:`guided_sample` counts them. An interrupted run goes
on. Writes results/inference_methods.json and .png; with ``--prompted``, stitched values that read the prompt (see
prompted_value.py) beside some of the others, results/inference_methods_prompted.json and .png; with
``--four-proposals``, two particles of four proposals under such a value beside FK-Tweedie's four and eight particles,
results/inference_methods_four_proposals.json and .png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stitchvm_ext import StitchedValue, TweedieValue
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.evaluation import Contender, compare
from stitchvm_ext.playground import load_pipeline, load_reward, load_value
from stitchvm_ext.playground.experiments import checker_measures, held_out_prompts

USED_FOR_CHOOSING = 96  # the first held-out captions: settings were chosen on them
SDE = {"transition": "linear_sde"}
PROPOSALS = {"num_proposals": 2, "proposal_window": (0.2, 0.6)}  # where the value can tell pictures apart
METHODS = {
    "unguided, ODE": ("dps", None, {}),
    "unguided": ("dps", None, SDE),
    "best of 2": ("best_of_n", None, {"num_particles": 2, **SDE}),
    "best of 4": ("best_of_n", None, {"num_particles": 4, **SDE}),
    "best of 8": ("best_of_n", None, {"num_particles": 8, **SDE}),
    "best of 8, stitched keeps 2 at 50%": ("best_of_n", "stitched", {"num_particles": 8, "keep": ((0.5, 2),), **SDE}),
    "FK-Tweedie (2)": ("fk", "Tweedie", {"num_particles": 2, **SDE}),
    "FK-Tweedie (4)": ("fk", "Tweedie", {"num_particles": 4, **SDE}),
    "FK-stitched (2, 1)": ("fk", "stitched", {"num_particles": 2, **SDE}),
    "FK-stitched (2, 2)": ("fk", "stitched", {"num_particles": 2, **PROPOSALS, **SDE}),
    "FK-stitched (4, 1)": ("fk", "stitched", {"num_particles": 4, **SDE}),
    "FK-stitched (4, 2)": ("fk", "stitched", {"num_particles": 4, **PROPOSALS, **SDE}),
    "DPS-Tweedie, sigma 2": ("dps", "Tweedie", {"strength": 2.0, "schedule": "sigma"}),
    "DPS-stitched, sigma 2": ("dps", "stitched", {"strength": 2.0, "schedule": "sigma"}),
    "DPS-stitched, constant 0.25": ("dps", "stitched", {"strength": 0.25}),
}
BESIDE_PROMPTED = {
    **{name: METHODS[name] for name in ("unguided", "FK-Tweedie (2)", "FK-Tweedie (4)", "DPS-Tweedie, sigma 2")},
    # at about the cost of a stitched value's gradient at every step
    "DPS-Tweedie, every 3rd": ("dps", "Tweedie", {"strength": 2.0, "schedule": "sigma", "every": 3, "between": "last"}),
}
EARLY = {"proposal_window": (0.0, 0.5)}  # these values tell pictures apart sooner (group_signal.py)


def prompted(value: str) -> dict[str, tuple[str, str, dict]]:
    return {
        f"FK-{value} (1, 4)": ("fk", value, {"num_particles": 1, "num_proposals": 4, **EARLY, **SDE}),
        f"FK-{value} (2, 1)": ("fk", value, {"num_particles": 2, **SDE}),
        f"FK-{value} (2, 2)": ("fk", value, {"num_particles": 2, "num_proposals": 2, **EARLY, **SDE}),
        f"DPS-{value}, sigma 2": ("dps", value, {"strength": 2.0, "schedule": "sigma"}),
    }


def four_proposals(value: str) -> dict[str, tuple[str, str, dict]]:
    """The window, without the first two steps, was chosen on captions for choosing."""
    options = {"num_particles": 2, "num_proposals": 4, "proposal_window": (0.1, 0.7), **SDE}
    return {
        "FK-Tweedie (4)": METHODS["FK-Tweedie (4)"],
        "FK-Tweedie (8)": ("fk", "Tweedie", {"num_particles": 8, **SDE}),
        f"FK-{value} (2, 4)": ("fk", value, options),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=64, help="latents at a time")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--prompted", type=Path, nargs="+", metavar="FOLDER", help="of values that read the prompt")
    which.add_argument("--four-proposals", type=Path, metavar="FOLDER", help="of a value that reads the prompt")
    args = parser.parse_args()

    pipe, reward = load_pipeline(), load_reward("clip")
    rewards = {"reward": reward, "held_out_reward": load_reward("clip", held_out=True)}
    values = {None: None, "stitched": load_value(pipe), "Tweedie": TweedieValue(pipe, reward)}
    name, methods = "inference_methods", METHODS
    if args.prompted:
        name, methods = f"{name}_prompted", dict(BESIDE_PROMPTED)
        for folder in args.prompted:
            values[folder.name] = StitchedValue.from_pretrained(folder, pipe)
            methods |= prompted(folder.name)
    if args.four_proposals:
        folder = args.four_proposals
        values[folder.name] = StitchedValue.from_pretrained(folder, pipe)
        name, methods = f"{name}_four_proposals", four_proposals(folder.name)
    contenders = [
        Contender(title, values[value], {"method": method, **({} if method == "dps" else {"reward": reward}), **chosen})
        for title, (method, value, chosen) in methods.items()
    ]
    found = compare(
        pipe, contenders, held_out_prompts(USED_FOR_CHOOSING + args.prompts)[USED_FOR_CHOOSING:], rewards,
        images_per_prompt=args.seeds, prompts_per_batch=16, measures=checker_measures,
        work_dir=RESULTS.parent / f".{name}", num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale, batch_size=args.batch_size,
    )  # fmt: skip
    settings = {k: getattr(args, k) for k in ("prompts", "seeds", "steps", "guidance_scale")}
    path = save(name, {**settings, "methods": found.figures})
    found.plot(path.with_suffix(".png"))
    print(f"\n{found.table()}\n\nwrote {path}")


if __name__ == "__main__":
    main()
