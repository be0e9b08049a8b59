"""Reward against denoiser evaluations: best-of-N, FK steering and DPS, with Tweedie's value and the stitched one.

    python benchmarks/inference_methods.py
    python benchmarks/inference_methods.py --prompted prompted_values/captions prompted_values/rollouts
    python benchmarks/inference_methods.py --proposals prompted_values/captions
    python benchmarks/inference_methods.py --dps prompted_values/captions prompted_values/guided

Held-out prompts that no setting was chosen on, several seeds each. Target reward, held-out reward, exact checker and a
diversity measure (mean distance between the seeds' pictures of one prompt in the held-out reward's embedding), with
standard errors over prompts; evaluations of the networks as :func:`guided_sample` counts them. An interrupted run goes
on. Writes results/inference_methods.json and .png; with ``--prompted``, stitched values that read the prompt (see
prompted_value.py) beside some of the others, results/inference_methods_prompted.json and .png; with ``--proposals``,
proposals under such a value, plain and twisted by its gradient, beside FK-Tweedie's four and eight particles,
results/inference_methods_proposals.json and .png; with ``--dps``, DPS by the SDE under such values and Tweedie's,
results/inference_methods_dps.json and .png. FLOPs per image are counted on one image, backward passes included.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stitchvm_ext import StitchedValue, TweedieValue, guided_sample
from stitchvm_ext.bench.counting import FlopCount
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.evaluation import Contender, compare
from stitchvm_ext.playground import load_pipeline, load_reward, load_value
from stitchvm_ext.playground.experiments import checker_measures, held_out_prompts
from stitchvm_ext.sampling import Guidance

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


def with_proposals(value: str) -> dict[str, tuple[str, str, dict]]:
    """Windows and strength were chosen on captions for choosing."""
    fk_tweedie = {f"FK-Tweedie ({n})": ("fk", "Tweedie", {"num_particles": n, **SDE}) for n in (4, 8)}
    plain = {"num_particles": 2, "num_proposals": 4, "proposal_window": (0.1, 0.7), **SDE}
    twisted = {"proposal_window": (0.35, 0.75), "guidance": Guidance(strength=0.3), **SDE}
    sizes = ((1, 1), (1, 2), (2, 2))
    return {
        **fk_tweedie,
        f"FK-{value} (2, 4)": ("fk", value, plain),
        **{
            f"FK-{value}, twisted ({n}, {m})": ("fk", value, {"num_particles": n, "num_proposals": m, **twisted})
            for n, m in sizes
        },
        "FK-Tweedie, twisted (1)": ("fk", "Tweedie", {"num_particles": 1, **twisted}),
    }


def dps(values: list[str]) -> dict[str, tuple[str, str, dict]]:
    """By the SDE, as in the paper; the same strengths for every value."""
    third = {"every": 3, "between": "last"}  # at about the cost of a stitched value's gradient at every step
    strengths = {
        "sigma 0.25": {"strength": 0.25, "schedule": "sigma"},
        "sigma 0.5": {"strength": 0.5, "schedule": "sigma"},
        "constant 0.3": {"strength": 0.3},
    }
    return {
        "unguided": METHODS["unguided"],
        **{
            f"DPS-{value}, {name}": ("dps", value, {**strength, **SDE})
            for value in ("Tweedie", *values)
            for name, strength in strengths.items()
        },
        "DPS-Tweedie, constant 0.3, every 3rd": ("dps", "Tweedie", {**strengths["constant 0.3"], **third, **SDE}),
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
    which.add_argument("--proposals", type=Path, metavar="FOLDER", help="of a value that reads the prompt")
    which.add_argument("--dps", type=Path, nargs="+", metavar="FOLDER", help="of values that read the prompt")
    args = parser.parse_args()

    pipe, reward = load_pipeline(), load_reward("clip")
    rewards = {"reward": reward, "held_out_reward": load_reward("clip", held_out=True)}
    values = {None: None, "stitched": load_value(pipe), "Tweedie": TweedieValue(pipe, reward)}
    folders = args.prompted or args.dps or ([args.proposals] if args.proposals else [])
    values |= {folder.name: StitchedValue.from_pretrained(folder, pipe) for folder in folders}
    names = [folder.name for folder in folders]
    if args.prompted:
        kind, methods = "_prompted", BESIDE_PROMPTED | {t: m for name in names for t, m in prompted(name).items()}
    elif args.proposals:
        kind, methods = "_proposals", with_proposals(*names)
    elif args.dps:
        kind, methods = "_dps", dps(names)
    else:
        kind, methods = "", METHODS
    name = f"inference_methods{kind}"
    contenders = [
        Contender(title, values[value], {"method": method, **({} if method == "dps" else {"reward": reward}), **chosen})
        for title, (method, value, chosen) in methods.items()
    ]
    prompts = held_out_prompts(USED_FOR_CHOOSING + args.prompts)[USED_FOR_CHOOSING:]
    common = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "batch_size": args.batch_size}
    found = compare(
        pipe, contenders, prompts, rewards, images_per_prompt=args.seeds, prompts_per_batch=16,
        measures=checker_measures, work_dir=RESULTS.parent / f".{name}", **common,
    )  # fmt: skip
    for contender in contenders:
        with FlopCount() as counted:
            guided_sample(pipe, contender.value, prompts[0], progress=False, **common, **contender.options)
        found.figures[contender.name]["flops_per_image"] = counted.flops
    settings = {k: getattr(args, k) for k in ("prompts", "seeds", "steps", "guidance_scale")}
    path = save(name, {**settings, "methods": found.figures})
    found.plot(path.with_suffix(".png"))
    gflops = "\n".join(f"{name}: {of['flops_per_image'] / 1e9:.1f} GFLOP" for name, of in found.figures.items())
    print(f"\n{found.table()}\n\n{gflops}\n\nwrote {path}")


if __name__ == "__main__":
    main()
