"""Stitched values that read the prompt, for the other benchmarks' ``--values``.

    python benchmarks/prompted_value.py captions
    python benchmarks/prompted_value.py rollouts

On the playground, with the pictures, steps and settings of the embedded value, whose backbone reads the null text:
``captions`` has the backbone read the pictures' captions; ``rollouts`` learns from the generator's own trajectories
under training captions, each with the reward at its end. A call that was stopped goes on. Writes WORK/captions or
WORK/rollouts.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

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
STEPS = 10  # of a rollout, without guidance, as the trainers' are; all its states are kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=("captions", "rollouts"))
    parser.add_argument("--work", type=Path, default=Path("prompted_values"))
    parser.add_argument("--pictures", type=int, default=TRAINING_PICTURES)
    parser.add_argument("--epochs", type=int, default=CONFIG.epochs)
    args = parser.parse_args()

    pipe, reward = load_pipeline(), load_reward("clip")
    pictures = world.dataset(PROBE_PICTURES + args.pictures, PICTURE_SEED)
    null = backbone_of(pipe).null_condition(pipe, **TEXT_OPTIONS)
    probe, latents = encode_probe(pipe, TensorImages(picture_tensor(pictures[:PROBE_PICTURES])), PROBE_PICTURES)
    search = search_stitch(backbone_of(pipe), reward, latents, probe, null)
    depth, layer = search.best.depth, search.best.layer
    value = untrained_value(pipe, reward, search, depth, layer, latents.shape[-2:], null, TEXT_OPTIONS, True)

    rest, cache = pictures[PROBE_PICTURES:], args.work / f"{args.source}_targets"
    captions = [picture.caption for picture in rest]
    if args.source == "captions":
        source = TensorImages(picture_tensor(rest), captions=captions)
        targets = cache_targets(cache, pipe, reward, source, batch_size=64, text_options=TEXT_OPTIONS)
    else:
        targets = cache_rollouts(
            cache, pipe, reward, captions, num_inference_steps=STEPS, guidance_scale=1.0, states=STEPS,
            batch_size=64, text_options=TEXT_OPTIONS, prompt_conditioned=True,
        )  # fmt: skip
    config = replace(CONFIG, epochs=args.epochs, prompt_share=1.0)
    losses = finetune(value, reward, targets, config, state_path=args.work / f"{args.source}_i{depth}.pt")
    print({term: [round(mean, 4) for mean in means] for term, means in losses.items()})
    value.save_pretrained(args.work / args.source)
    print(f"wrote {args.work / args.source}, i = {depth}, j = {layer}")


if __name__ == "__main__":
    main()
