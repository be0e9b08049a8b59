"""A whole run of :func:`sample_prompts` on the small models, as a program of its own: for torchrun, and to be killed.

    prompt_run.py PROMPTS OUT [--stop-after N | --kill-seed N]

Appends the indices of every batch that is drawn to OUT.log, a line each. ``--stop-after`` kills every process when it
has drawn so many batches. With ``--kill-seed`` the run is started and killed, by SIGKILL, again and again: before and
after it renames a file, within a row, and at moments drawn from that seed; what each kill left is a line of the log,
and the rest is left to another call.
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

from stitchvm_ext.backbones import backbone_of  # noqa: E402
from stitchvm_ext.sampling import sample_prompts  # noqa: E402
from stitchvm_ext.value.stitch_layer import StitchLayer  # noqa: E402
from stitchvm_ext.value.stitched import StitchedValue  # noqa: E402
from tests import tiny  # noqa: E402

MODULE = sys.modules["stitchvm_ext.sampling.sample_prompts"]
FOLDER = MODULE.SampleFolder
TEXT = {"max_sequence_length": 0}  # the tiny pipeline has no T5
OPTIONS = {
    "images_per_prompt": 2, "images_per_batch": 3, "seed": 7, "num_inference_steps": 3, "guidance_scale": 3.0,
    "method": "fk", "num_particles": 2, "num_proposals": 2, "resample_every": 1, "max_sequence_length": 0,
    "progress": False,
}  # fmt: skip


def models():
    """A pipeline and a stitched value with a random stitch."""
    pipe, reward = tiny.tiny_pipeline(), tiny.tiny_reward()
    backbone = backbone_of(pipe)
    torch.manual_seed(0)
    stitch = StitchLayer(backbone.width(), reward.width, reward.grid)
    null = backbone.null_condition(pipe, **TEXT)
    value = StitchedValue(
        backbone, stitch, reward.suffix(1), depth=2, layer=1, latent_size=(16, 16), null_condition=null,
        text_options=TEXT,
    )  # fmt: skip
    return pipe, value.eval().requires_grad_(False)


def log(out: Path, line: str) -> None:
    with open(f"{out}.log", "a") as file:
        file.write(line + "\n")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(args: argparse.Namespace, pipe, value) -> None:
    drawn, original = 0, MODULE.draw

    def draw(pipe, value, batch, **options):
        nonlocal drawn
        if args.stop_after is not None and drawn == args.stop_after:
            kill_self()
        drawn += 1
        log(args.out, "drawn " + " ".join(str(sample.index) for sample in batch))
        return original(pipe, value, batch, **options)

    MODULE.draw = draw
    sample_prompts(pipe, value, args.prompts, args.out, **OPTIONS)


def kill_at_rename(name: str, after: bool) -> None:
    original = Path.replace

    def replace(path, target):
        if target.name == name and not after:
            kill_self()
        original(path, target)
        if target.name == name:
            kill_self()

    Path.replace = replace


def kill_in_row(number: int) -> None:
    original = FOLDER.rows_of_process

    class Torn:
        def __init__(self, file):
            self.file, self.count = file, 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, line):
            self.count += 1
            self.file.write(line[: len(line) // 2] if self.count == number else line)
            self.file.flush()
            if self.count == number:
                kill_self()

        def flush(self):
            self.file.flush()

    FOLDER.rows_of_process = lambda folder, process: Torn(original(folder, process))


def batches(out: Path) -> int:
    """How many batches were begun since the last kill."""
    lines = Path(f"{out}.log").read_text().splitlines()
    return next((count for count, line in enumerate(reversed(lines)) if line.startswith("killed")), len(lines))


def run_killed(args: argparse.Namespace, pipe, value) -> None:
    """Fork a child per attempt, so that everything is imported once; the child is a process like any other."""
    draw = random.Random(args.kill_seed)
    kills = [
        lambda: kill_at_rename("settings.json", after=False),
        lambda: kill_at_rename("settings.json", after=True),
        lambda: kill_in_row(2),
        lambda: kill_at_rename("00002.png", after=True),  # an image without its row
        lambda: kill_at_rename("00004.png", after=False),  # an image that is written but not there
        lambda: kill_in_row(1),
        *[None] * 3,  # at any moment
        lambda: kill_at_rename("samples.jsonl", after=False),
        lambda: kill_at_rename("samples.jsonl", after=True),
    ]
    for prepare in kills:
        child = os.fork()
        if child == 0:
            try:
                if prepare is not None:
                    prepare()
                run(args, pipe, value)
            finally:
                os._exit(0)
        if prepare is None:
            while not batches(args.out):
                time.sleep(0.002)
            seen, deadline = batches(args.out), time.monotonic() + draw.uniform(0, 0.1)
            while batches(args.out) == seen and time.monotonic() < deadline:  # at most one more: a fast machine's too
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the run ended before it was killed"
        log(args.out, "killed " + " ".join(str(row["index"]) for row in FOLDER(args.out).rows()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--kill-seed", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (run if args.kill_seed is None else run_killed)(args, *models())
