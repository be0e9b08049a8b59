"""Position and class tokens at j > 1: fitted to the probe images, or, as the paper says literally, the reward's input
ones once more?

    python benchmarks/stitch_tokens.py

On the playground: the closed-form loss of every pair with either; then, at the depth of the search's pick and every j,
how well the value reads noisy held-out pictures, before and after a short finetuning of the same steps. At j = 1 the
two are one. Writes results/stitch_tokens.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace

import torch

from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.bench.harness import save
from stitchvm_ext.data import TensorImages
from stitchvm_ext.playground import load_pipeline, load_reward, world
from stitchvm_ext.playground.experiments import held_out, noise_level_accuracy, picture_tensor
from stitchvm_ext.playground.train import PICTURE_SEED
from stitchvm_ext.playground.train_value import CONFIG, PROBE_PICTURES
from stitchvm_ext.value import finetune, search_stitch
from stitchvm_ext.value.search import TOKENS
from stitchvm_ext.value.stitching import encode_probe, untrained_value
from stitchvm_ext.value.targets import cache_targets

SIGMAS = (0.1, 0.5, 0.75)
TEXT_OPTIONS = {"max_sequence_length": 0}


def accuracy(value, data) -> dict[str, list[float]]:
    """Retrieval, rank correlation and cosine at every noise level."""
    rows = noise_level_accuracy(value, data, sigmas=SIGMAS)
    return {name: [row[name] for row in rows] for name in ("r_at_1", "spearman", "cosine")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3200, help="pictures to finetune on, once each")
    parser.add_argument("--held-out", type=int, default=500, help="pictures to measure on")
    parser.add_argument("--seeds", type=int, default=2, help="of batches, noise levels and noise")
    args = parser.parse_args()

    torch.set_num_threads(1)
    pipe, reward = load_pipeline(), load_reward("clip")
    backbone = backbone_of(pipe)
    null = backbone.null_condition(pipe, **TEXT_OPTIONS)
    images = picture_tensor(world.dataset(args.images + PROBE_PICTURES, PICTURE_SEED))
    probe, latents = encode_probe(pipe, TensorImages(images[-PROBE_PICTURES:]), PROBE_PICTURES)
    searches = {tokens: search_stitch(backbone, reward, latents, probe, null, tokens=tokens) for tokens in TOKENS}
    closed_form = {}
    for tokens, search in searches.items():
        print(f"\n{tokens}\n{search.table()}", flush=True)
        cells = search.candidates.items()
        closed_form[tokens] = {f"{i},{j}": {"mse": c.mse, "unexplained": c.unexplained} for (i, j), c in cells}

    depth = searches["fitted"].best.depth
    data = held_out(pipe, reward, args.held_out)
    config = replace(CONFIG, epochs=1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        targets = cache_targets(scratch, pipe, reward, images[:-PROBE_PICTURES])
        for layer in searches["fitted"].layers:
            for tokens, search in searches.items():
                if layer == 1 and tokens == "literal":
                    continue
                options = (pipe, reward, search, depth, layer, tuple(latents.shape[-2:]), null, TEXT_OPTIONS)
                row = {"layer": layer, "tokens": tokens, "before": accuracy(untrained_value(*options), data)}
                after, losses = [], []
                for seed in range(args.seeds):
                    value = untrained_value(*options)
                    history = finetune(value, reward, targets, replace(config, seed=seed), progress=False)
                    losses.append(sum(terms[-1] for terms in history.values()))
                    after.append(accuracy(value, data))
                row["after"] = {
                    name: [statistics.mean(values) for values in zip(*(a[name] for a in after), strict=True)]
                    for name in row["before"]
                }
                row |= {"after_by_seed": after, "final_losses": losses}
                rows.append(row)
                for stage in ("before", "after"):
                    figures = "; ".join(f"{n} {' '.join(f'{v:.3f}' for v in vs)}" for n, vs in row[stage].items())
                    print(f"j = {layer} {tokens} {stage}: {figures}", flush=True)
    result = {
        "probe_images": PROBE_PICTURES,
        "images": args.images,
        "steps": args.images // config.batch_size,
        "seeds": args.seeds,
        "held_out": args.held_out,
        "sigmas": SIGMAS,
        "depth": depth,
        "closed_form": closed_form,
        "values": rows,
    }
    print(f"wrote {save('stitch_tokens', result)}")


if __name__ == "__main__":
    main()
