"""A run of a trainer on the small models, as a program of its own: for torchrun, and to be killed.

    nft_run.py FOLDER RESULT [--method NAME] [--stitched] [--train-batch N] [--rollout-batch N]
        [--prompts N] [--iterations N] [--shard] [--checkpoint] [--kill-seed N]

Writes to RESULT, from the main process, weights, log and which share of a block's frozen weights it holds. With
``--kill-seed`` the run is started and killed ten times, by SIGKILL, at moments drawn from that seed; it prints what
each kill left, and leaves the rest to another call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2]))  # last: what is installed is tested

from tests.programs import kill_repeatedly  # noqa: E402
from tests.training.build import build, weights  # noqa: E402


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    trainer = build(
        args.folder, method=args.method, stitched=args.stitched, train_batch_size=args.train_batch,
        rollout_batch_size=args.rollout_batch, iterations=args.iterations, save_every=1,
        prompts_per_iteration=args.prompts, shard_frozen_weights=args.shard, gradient_checkpointing=args.checkpoint,
    )  # fmt: skip
    rows = trainer.train(progress=False)
    if trainer.state.is_main_process and args.result:
        frozen = [p for name, p in trainer.policy.blocks[0].named_parameters() if "lora" not in name]
        held = sum(len(getattr(p, "_local_tensor", p).flatten()) for p in frozen) / sum(p.numel() for p in frozen)
        torch.save({"weights": weights(trainer), "rows": rows, "held": held}, args.result)


def run_killed(args: argparse.Namespace) -> None:
    build(args.folder.with_name("warm"), method=args.method, stitched=args.stitched)
    newest = lambda: max((args.folder / "checkpoints").glob("iteration_*"), default=None)  # noqa: E731
    step = lambda: 0 if newest() is None else int(newest().name.split("_")[1])  # noqa: E731
    # The first ones may hit the preparations; the others training, from its first checkpoint on.
    kill_repeatedly(lambda: run(args), newest, step, seed=args.kill_seed, early=2, longest=0.3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--method", default="nft")
    parser.add_argument("--stitched", action="store_true")
    parser.add_argument("--train-batch", type=int, default=8)
    parser.add_argument("--rollout-batch", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--kill-seed", type=int)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--prompts", type=int, default=2)
    args = parser.parse_args()
    run(args) if args.kill_seed is None else run_killed(args)
