"""``sample_prompts``: a file of prompts to a folder of images, in several processes, resumable."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..backbones import backbone_of
from ..value.base import ValueEstimator
from ..value.processes import from_main, processes
from .checks import check_count
from .guided_sample import GuidedSampleOutput, guided_sample
from .methods import make_options
from .prompt_file import Prompt, Sample, as_entries, expand_prompts, in_batches, read_prompts
from .settings import call_identity, difference, pipe_identity, plain

# Arguments of guided_sample that follow from the prompts and seeds of a run.
OWN = ("generator", "latents", "num_images_per_prompt", "output_type")
Row = dict[str, Any]


def sample_prompts(
    pipe,
    value: ValueEstimator | None,
    prompts: str | Path | Sequence[str | Prompt],
    out: str | Path,
    *,
    images_per_prompt: int = 1,
    images_per_batch: int = 8,
    seed: int = 0,
    negative_prompt: str = "",
    progress: bool = True,
    **options,
) -> list[Row]:
    """Draw the images of many prompts into a folder, by :func:`guided_sample`.

    Under ``torchrun`` or ``accelerate launch`` the processes share the batches. A batch holds the same samples whoever
    draws it and whenever, so the files do not depend on the number of processes, nor on interruptions, to the bit
    (where the processes compute alike: as many threads on the same kind of device). A call that was killed goes on
    with the batches that are not finished.

    The folder gets ``00000.png``, ``00001.png``, ... (frames of videos ``00000_000.png``, ...), settings.json and, in
    the end, samples.jsonl. Until then each process adds its rows to a file of its own, ``samples.0.jsonl``, an image's
    row right after its file.

    Args:
        pipe, value: as for :func:`guided_sample`.
        prompts: a file or a list, see :func:`~stitchvm_ext.sampling.read_prompts`.
        out: a folder, new or of an interrupted call.
        images_per_prompt: images of a prompt stand next to each other.
        images_per_batch: drawn together; samplers of K particles work on K times as many latents.
        seed: of the first image; every further one has the next, whatever its prompt, unless that has its own.
        negative_prompt: of prompts without one of their own.
        progress: show a bar, of the main process's share.
        options: of :func:`guided_sample`, the method's among them.

    Returns:
        the rows of samples.jsonl, one per image: ``index``; ``files``, names in the folder; ``prompt``; ``seed``;
        ``values`` at the steps and ``rewards`` of the particles, None where there is none; ``evaluations``, the image's
        share of its batch's.
    Raises:
        ValueError: the folder has images of other settings or prompts; names the first difference.
        TypeError, ValueError, OSError: bad input, before any work.
    """
    prompts = read_prompts(prompts)
    samples = expand_prompts(prompts, images_per_prompt, seed, negative_prompt)
    batches = in_batches(samples, images_per_batch)
    arguments = call_arguments(options)
    check_count("num_inference_steps", arguments["num_inference_steps"])
    backbone = backbone_of(pipe)
    settings = {
        **call_identity(pipe, value, arguments),
        "pipe": pipe_identity(pipe),
        "images_per_prompt": images_per_prompt,
        "images_per_batch": images_per_batch,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "prompts": as_entries(prompts),
    }
    folder = SampleFolder(Path(out))
    settings = json.loads(json.dumps(settings, default=plain))
    folder.check_settings(settings)
    state = processes(backbone.device)
    done = set(from_main(state, folder.begin(settings) if state.is_main_process else None))
    todo = [batch for batch in batches if any(s.index not in done for s in batch)]
    mine = todo[state.process_index :: state.num_processes]

    show = progress and state.is_main_process and bool(mine)
    with (
        tqdm(total=sum(map(len, mine)), desc="sample_prompts", unit="image", disable=not show) as bar,
        folder.rows_of_process(state.process_index) as rows,
    ):
        for batch in mine:
            result = draw(pipe, value, batch, **options)
            for sample, row, image in zip(batch, _rows(result), result.images, strict=True):
                if sample.index not in done:
                    files = folder.save_image(sample.index, image)
                    row = {"index": sample.index, "files": files, "prompt": sample.prompt, "seed": sample.seed, **row}
                    rows.write(json.dumps(row) + "\n")
                    rows.flush()
            bar.update(len(batch))
    state.wait_for_everyone()
    if state.is_main_process:
        folder.merge()
    state.wait_for_everyone()
    return folder.rows()


def draw(pipe, value: ValueEstimator | None, batch: Sequence[Sample], **options) -> GuidedSampleOutput:
    """One call of :func:`guided_sample` for some samples of a run."""
    return guided_sample(
        pipe,
        value,
        [s.prompt for s in batch],
        negative_prompt=[s.negative_prompt for s in batch],
        generator=[s.generator for s in batch],
        progress=False,
        **options,
    )


def call_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of :func:`guided_sample` with these options, defaults included; the method's own as an
    object, under "options". Raises TypeError for unknown ones and for those that a run of prompts makes itself.
    """
    for name in (*OWN, "prompt"):
        if name in options:
            raise TypeError(f"{name}: expected none, it follows from the prompts and seeds")
    bound = inspect.signature(guided_sample).bind(None, None, "", **options)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name in ("pipe", "value", "prompt", "negative_prompt", "progress", *OWN):
        del arguments[name]
    return {**arguments, "options": make_options(arguments["method"], arguments["options"])}


class SampleFolder:
    """A folder of images, their rows, and the settings that they were drawn with."""

    def __init__(self, path: Path):
        self.path = path
        self.settings_file, self.merged = path / "settings.json", path / "samples.jsonl"

    def _parts(self) -> list[Path]:
        return sorted(p for p in self.path.glob("samples.*.jsonl") if p.name.split(".")[1].isdecimal())

    def rows(self) -> list[Row]:
        """The finished images', by index. A row that a kill cut short, and one whose files are gone, is none."""
        found = {}
        for file in (self.merged, *self._parts()):
            for line in file.read_bytes().split(b"\n")[:-1] if file.is_file() else ():
                row = json.loads(line)
                found[row["index"]] = row
        kept = [row for row in found.values() if all((self.path / name).is_file() for name in row["files"])]
        return sorted(kept, key=lambda row: row["index"])

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raises ValueError where the folder has images of other settings."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: expected a folder, got {self.path}, which is none")
        if not self.rows():
            return
        if not self.settings_file.is_file():
            raise ValueError(f"out: expected a new folder, got {self.path}, whose samples have no settings.json")
        found = difference(json.loads(self.settings_file.read_text(encoding="utf-8")), settings)
        if found:
            name, theirs, ours = found
            raise ValueError(
                f"out: {self.path} has samples of another call, give another folder: {name}: expected "
                f"{theirs!r:.200}, got {ours!r:.200}"
            )

    def begin(self, settings: dict[str, Any]) -> list[int]:
        """Write the settings; returns the indices of finished images. For one process, before any adds rows."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.settings_file, json.dumps(settings, indent=1))
        return [row["index"] for row in self.rows()]

    def rows_of_process(self, number: int):
        """The file, open, that this process adds its rows to; the part of a row that a kill left is cut off."""
        path = self.path / f"samples.{number}.jsonl"
        if path.is_file():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        return open(path, "a", encoding="utf-8")

    def save_image(self, index: int, image) -> list[str]:
        """Write a PIL image, or a video's list of them; returns the names. Each file is whole or not there."""
        names = [f"{index:05d}.png"]
        frames = [image]
        if isinstance(image, list):
            frames, names = image, [f"{index:05d}_{k:03d}.png" for k in range(len(image))]
        for name, frame in zip(names, frames, strict=True):
            partial = self.path / f"{name}.partial"
            frame.save(partial, format="PNG")
            partial.replace(self.path / name)
        return names

    def merge(self) -> None:
        """All rows into samples.jsonl; the processes' own files go."""
        parts = self._parts()
        _write(self.merged, "".join(json.dumps(row) + "\n" for row in self.rows()))
        for part in parts:
            part.unlink()


def _rows(result: GuidedSampleOutput) -> Iterable[Row]:
    """What a result says of each of its samples."""
    count = len(result.latents)
    share = {name: round(number / count, 6) for name, number in asdict(result.evaluations).items()}
    for values, rewards in zip(result.values.T, result.rewards, strict=True):
        yield {"values": _numbers(values), "rewards": _numbers(rewards), "evaluations": share}


def _numbers(values: Tensor) -> list[float | None]:
    """JSON has no NaN."""
    return [x if math.isfinite(x) else None for x in values.tolist()]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
