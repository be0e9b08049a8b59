"""A whole run of :func:`stitch` on the small models, as a program of its own: for torchrun, and to be killed.

    stitch_run.py WORK_DIR RESULT [--accumulate N] [--epochs N] [--stop-at N] [--kill-seed N]

Trains values of two rewards and writes their weights to RESULT, from the main process. With ``--stop-at`` it ends after
that many steps. With ``--kill-seed`` the run is
started and killed ten times, by SIGKILL, at moments drawn from that seed; it prints what each kill left, and leaves the
rest to another call.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2]))  # last: what is installed is tested

from stitchvm_ext import stitch  # noqa: E402
from stitchvm_ext.value import FinetuneConfig, stitching  # noqa: E402
from tests import tiny  # noqa: E402
from tests.programs import kill_repeatedly  # noqa: E402

stitching.cache_targets = functools.partial(stitching.cache_targets, shard_size=8)  # for several of them


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    coarse = torch.rand(72, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    if args.stop_at:
        stitching.finetune = functools.partial(stitching.finetune, stop_at=args.stop_at)
    config = FinetuneConfig(
        epochs=args.epochs, batch_size=8, learning_rate=1e-4, warmup_steps=4, save_every=3,
        gradient_accumulation_steps=args.accumulate,
    )  # fmt: skip
    values = stitch(
        tiny.tiny_pipeline(), [tiny.tiny_reward(), tiny.tiny_reward(2)],
        torch.nn.functional.interpolate(coarse, size=32, mode="bilinear"), layer=1, probe_images=16,
        work_dir=args.work_dir, config=config, text_options={"max_sequence_length": 0}, progress=False,
    )  # fmt: skip
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save([value.state_dict() for value in values], args.result)


def step_of(state: Path | None) -> int:
    return torch.load(state, weights_only=True)["step"] if state else 0


def run_killed(args: argparse.Namespace) -> None:
    tiny.tiny_pipeline(), tiny.tiny_reward(), tiny.tiny_reward(2)
    state = lambda: next(iter(args.work_dir.glob("state_*.pt")), None)  # noqa: E731
    version = lambda: state().stat().st_mtime_ns if state() else None  # noqa: E731
    # The first ones may hit search and cache; the others training, from its first state on.
    kill_repeatedly(lambda: run(args), version, lambda: step_of(state()), seed=args.kill_seed, early=3, longest=0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--kill-seed", type=int)
    args = parser.parse_args()
    run(args) if args.kill_seed is None else run_killed(args)
