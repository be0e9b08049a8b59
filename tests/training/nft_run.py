"""A run of a trainer on the small models, as a program of its own: for torchrun, and to be killed.

    nft_run.py FOLDER RESULT [--method NAME] [--stitched] [--train-batch N] [--rollout-batch N]
        [--iterations N] [--kill-seed N]

Writes weights and log to RESULT, from the main process. With ``--kill-seed`` the run is started and killed ten times,
by SIGKILL, at moments drawn from that seed; it prints what each kill left, and leaves the rest to another call.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2]))  # last: what is installed is tested

from tests.training.build import build, weights  # noqa: E402

KILLS = 10


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    trainer = build(
        args.folder, method=args.method, stitched=args.stitched, train_batch_size=args.train_batch,
        rollout_batch_size=args.rollout_batch, iterations=args.iterations, save_every=1,
    )  # fmt: skip
    rows = trainer.train(progress=False)
    if trainer.state.is_main_process and args.result:
        torch.save({"weights": weights(trainer), "rows": rows}, args.result)


def run_killed(args: argparse.Namespace) -> None:
    """Fork a child per attempt, so that everything is imported once; the child is a process like any other."""
    from matplotlib.figure import Figure

    Figure().savefig(os.devnull, format="png")
    build(args.folder.with_name("warm"), method=args.method, stitched=args.stitched)
    draw = random.Random(args.kill_seed)
    newest = lambda: max((args.folder / "checkpoints").glob("iteration_*"), default=None)  # noqa: E731
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                run(args)
            finally:
                os._exit(0)
        before = newest()
        if kill > 1:  # the first ones may hit the preparations; the others training, from its first checkpoint on
            while newest() == before:
                if os.waitpid(child, os.WNOHANG)[0]:
                    sys.exit("the run ended before it was killed")
                time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        found = newest()
        step = 0 if found is None else int(found.name.split("_")[1])
        print(f"killed={os.waitstatus_to_exitcode(status) == -signal.SIGKILL} step={step}", flush=True)


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
    args = parser.parse_args()
    run(args) if args.kill_seed is None else run_killed(args)
