"""Stitched values that read the prompt, for the other benchmarks' ``--values``.

    python benchmarks/prompted_value.py captions
    python benchmarks/prompted_value.py rollouts
    python benchmarks/prompted_value.py guided --start prompted_values/captions

On the playground, with the pictures, steps and settings of the embedded value, whose backbone reads the null text:
``captions`` has the backbone read the pictures' captions; ``rollouts`` learns from the generator's own trajectories
under training captions, each with the reward at its end, as trainers sample; ``guided`` from noisy ones with guidance,
as inference_methods.py samples. A call that was stopped goes on. Writes WORK/SOURCE, or WORK/SOURCE-DEPTH with
``--depth``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from stitchvm_ext import StitchedValue
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.data import TensorImages
from stitchvm_ext.playground import load_pipeline, load_reward, world
from stitchvm_ext.playground.experiments import picture_tensor
from stitchvm_ext.playground.train import PICTURE_SEED
from stitchvm_ext.playground.train_value import CONFIG, PROBE_PICTURES, TRAINING_PICTURES
from stitchvm_ext.value import cache_rollouts, finetune, search_stitch
from stitchvm_ext.value.stitching import encode_probe, untrained_value
from stitchvm_ext.value.targets import cache_targets

TEXT_OPTIONS = {"max_sequence_length": 0}
ROLLOUTS = {
    "rollouts": {"num_inference_steps": 10, "guidance_scale": 1.0, "states": 10},
    "guided": {"num_inference_steps": 20, "guidance_scale": 3.0, "transition": "linear_sde", "states": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=("captions", *ROLLOUTS))
    parser.add_argument("--work", type=Path, default=Path("prompted_values"))
    parser.add_argument("--pictures", type=int, default=TRAINING_PICTURES)
    parser.add_argument("--epochs", type=int, default=CONFIG.epochs)
    parser.add_argument(
        "--depth", type=int, choices=range(1, 7), help="blocks of the backbone; by default what the search picks"
    )
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="of a value of that depth to train on")
    args = parser.parse_args()

    pipe, reward = load_pipeline(), load_reward("clip")
    pictures = world.dataset(PROBE_PICTURES + args.pictures, PICTURE_SEED)
    if args.start:
        value = StitchedValue.from_pretrained(args.start, pipe)
        if args.depth not in (None, value.depth):
            parser.error(f"--depth: expected {value.depth}, of the value to train on, got {args.depth}")
    else:
        value = stitched(pipe, reward, pictures[:PROBE_PICTURES], args.depth)

    rest, cache = pictures[PROBE_PICTURES:], args.work / f"{args.source}_targets"
    captions = [picture.caption for picture in rest]
    if args.source == "captions":
        source = TensorImages(picture_tensor(rest), captions=captions)
        targets = cache_targets(cache, pipe, reward, source, batch_size=64, text_options=TEXT_OPTIONS)
    else:
        targets = cache_rollouts(
            cache, pipe, reward, captions, batch_size=64, text_options=TEXT_OPTIONS, prompt_conditioned=True,
            **ROLLOUTS[args.source],
        )  # fmt: skip
    config = replace(CONFIG, epochs=args.epochs, prompt_share=1.0)
    name = args.source if args.depth is None else f"{args.source}-{args.depth}"
    losses = finetune(value, reward, targets, config, state_path=args.work / f"{name}.pt")
    print({term: [round(mean, 4) for mean in means] for term, means in losses.items()})
    value.save_pretrained(args.work / name)
    print(f"wrote {args.work / name}, i = {value.depth}, j = {value.layer}")


def stitched(pipe, reward, pictures: list[world.Picture], depth: int | None) -> StitchedValue:
    """The best stitch in closed form, of all depths or one."""
    null = backbone_of(pipe).null_condition(pipe, **TEXT_OPTIONS)
    probe, latents = encode_probe(pipe, TensorImages(picture_tensor(pictures)), len(pictures))
    search = search_stitch(backbone_of(pipe), reward, latents, probe, null)
    depth = depth or search.best.depth
    layer = min(search.layers, key=lambda layer: search.at(depth, layer).mse)
    return untrained_value(pipe, reward, search, depth, layer, latents.shape[-2:], null, TEXT_OPTIONS, True)


if __name__ == "__main__":
    main()
