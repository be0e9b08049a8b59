"""After how many images or training runs does stitching pay for itself?

    python benchmarks/payback.py              # measured on the playground, 15 to 30 minutes; writes payback.json
    python benchmarks/payback.py --planner    # predicted at real scale, some minutes; writes payback_planner.json

On the playground, in one run and on one thread: seconds of stage 1 and of stage 2, as the embedded value was trained,
then rewards and seconds per image of StitchVM-DPS with that value and of Tweedie-DPS, each at several numbers of steps.
Printed is, for every setting of StitchVM-DPS that no other of its settings beats in reward and time, the fastest
Tweedie-DPS that reaches as much, and the images after which the stages' seconds are saved.

The planner predicts the same for large models: GPU-hours of the stages over GPU-seconds that an image, or an iteration
of DiffusionNFT, saves.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from guidance import run, table

from stitchvm_ext import TweedieValue
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.bench.harness import save
from stitchvm_ext.bench.pages import CRITERIA, payback_table
from stitchvm_ext.data import as_image_source
from stitchvm_ext.evaluation.compare import Contender
from stitchvm_ext.plan import ARCHITECTURES, Plan, plan
from stitchvm_ext.plan.report import NOTES
from stitchvm_ext.playground import load_pipeline, load_reward, world
from stitchvm_ext.playground.experiments import held_out_prompts, picture_tensor
from stitchvm_ext.playground.train import PICTURE_SEED
from stitchvm_ext.playground.train_value import CONFIG, PROBE_PICTURES, TRAINING_PICTURES
from stitchvm_ext.training import NFTConfig
from stitchvm_ext.value import StitchedValue, finetune, search_stitch
from stitchvm_ext.value.stitching import encode_probe, untrained_value
from stitchvm_ext.value.targets import cache_targets

TEXT_OPTIONS = {"max_sequence_length": 0}
SETTINGS = ({"schedule": "sigma", "strength": 2.0}, {"schedule": "constant", "strength": 0.25})  # guidance.py's best
STEPS = (6, 8, 10, 14, 20)

BACKBONES = ("sd3.5-medium", "sd3.5-large", "flux.1-dev", "hunyuanimage-2.1")
TOWER, DEVICE = "clip-l14-336", "h200"
TRAINING_IMAGES = (10_000, 100_000, 1_000_000)
NFT = NFTConfig()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planner", action="store_true", help="predict for large models; nothing is run")
    parser.add_argument("--pictures", type=int, default=TRAINING_PICTURES, help="of stage 2; three epochs of them")
    parser.add_argument("--prompts", type=int, default=36)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--shared-machine", action="store_true", help="note in the result that other programs ran")
    args = parser.parse_args()
    if args.planner:
        print(f"wrote {save('payback_planner', predict())}")
        return
    torch.set_num_threads(1)
    result = measure(args.pictures, args.prompts, args.steps)
    for criterion in CRITERIA:
        print("\n".join(payback_table(result, criterion)) + "\n")
    print(f"wrote {save('payback', {'shared_machine': args.shared_machine, **result})}")


# -- measured ----------------------------------------------------------------------------------------------------------


def measure(pictures: int, prompts: int, steps: list[int]) -> dict[str, Any]:
    """Both stages, then both methods with the value that came of them."""
    pipe, reward = load_pipeline(), load_reward("clip")
    images = picture_tensor(world.dataset(PROBE_PICTURES + pictures, PICTURE_SEED))
    value, seconds = make_value(pipe, reward, images)
    print("; ".join(f"{stage}: {taken:.0f} s" for stage, taken in seconds.items()), flush=True)
    rewards = {"reward": reward, "held_out_reward": load_reward("clip", held_out=True)}
    methods = [Contender("unguided", None, {"num_inference_steps": max(steps)})]
    for name, estimator in (("stitched", value), ("Tweedie", TweedieValue(pipe, reward))):
        for setting in SETTINGS:
            for number in steps:
                title = f"{name} {setting['schedule']} {setting['strength']:g}, {number} steps"
                methods.append(Contender(title, estimator, {**setting, "num_inference_steps": number}))
    figures = run(pipe, methods, held_out_prompts(prompts), rewards, "methods", {"guidance_scale": 3.0})
    print(f"\n{table(figures)}\n", flush=True)
    return {
        "pictures": pictures,
        "training_steps": CONFIG.epochs * (pictures // CONFIG.batch_size),
        "batch_size": CONFIG.batch_size,
        "depth": value.depth,
        "layer": value.layer,
        "seconds": seconds,
        "prompts": prompts,
        "figures": figures,
    }


def make_value(pipe, reward, images: torch.Tensor) -> tuple[StitchedValue, dict[str, float]]:
    """The playground's value as ``stitch`` makes it, and the seconds of each stage."""
    backbone, source = backbone_of(pipe), as_image_source(images)
    null = backbone.null_condition(pipe, **TEXT_OPTIONS)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[stage] = time.perf_counter() - began

    with tempfile.TemporaryDirectory() as scratch:
        with timed("stage 1: search"):
            probe, latents = encode_probe(pipe, source, PROBE_PICTURES)
            search = search_stitch(backbone, reward, latents, probe, null)
        best = search.best
        size = tuple(latents.shape[-2:])
        value = untrained_value(pipe, reward, search, best.depth, best.layer, size, null, TEXT_OPTIONS)
        with timed("stage 2: targets"):
            targets = cache_targets(Path(scratch) / "targets", pipe, reward, source, skip=PROBE_PICTURES)
        with timed("stage 2: finetuning"):
            finetune(value, reward, targets, CONFIG, state_path=Path(scratch) / "state.pt")
    return value, seconds


# -- predicted ---------------------------------------------------------------------------------------------------------


def predict() -> dict[str, Any]:
    """The planner's stages and savings; every pair is its (low, high): roofline, and eager PyTorch at assumed rates."""
    return {
        "reward": TOWER,
        "device": DEVICE,
        "training_images": TRAINING_IMAGES,
        "nft_samples": NFT.samples,
        "nft_iterations": NFT.iterations,
        "notes": NOTES,
        "backbones": {name: predict_one(name) for name in BACKBONES},
    }


def predict_one(backbone: str) -> dict[str, Any]:
    """One backbone: the stages, and seconds of an image by DPS and of an iteration of DiffusionNFT, by method.

    Stitched is a value on the null text, whose prefix is shared where there is an unconditional branch; baselines are
    those without checkpointing, which are the faster ones.
    """
    dps, nft = (plan(backbone, TOWER, method, device=DEVICE) for method in ("dps", "nft"))
    print(f"planned {backbone}", flush=True)
    which = "prefix shared" if ARCHITECTURES[backbone].classifier_free else "own prefix"
    baselines = [row for row in dps.rows if row.name.startswith("Tweedie") and "checkpointed" not in row.name]
    clean, stitched = nft.row("DiffusionNFT"), next(row for row in nft.rows if row.name.startswith("stitched"))
    passes = NFT.samples / nft.settings["batch"]
    return {
        "dps": {
            **stages(dps),
            "steps": dps.settings["steps"],
            "plain": dps.row("plain").seconds,
            "baselines": {row.name: row.seconds for row in baselines},
            "stitched": dps.row(f"stitched, {which}, save").seconds,
            "prefix": which,
        },
        "nft": {
            **stages(nft),
            "steps": nft.settings["steps"],
            "baselines": {clean.name: clean.seconds * passes},
            "stitched": stitched.seconds * passes,
        },
    }


def stages(planned: Plan) -> dict[str, Any]:
    """Stage 1, and stage 2 by number of images, in GPU-hours; stage 2 is proportional to the images."""
    search, anew, cached = planned.stages
    return {
        "resolution": planned.settings["resolution"],
        "epochs": planned.settings["epochs"],
        "search_hours": search.gpu_hours,
        "finetune_hours": {
            name: {images: stage.gpu_hours * (images / stage.images) for images in TRAINING_IMAGES}
            for name, stage in (("encoded anew", anew), ("cached", cached))
        },
    }


if __name__ == "__main__":
    main()
