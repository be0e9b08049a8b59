"""The same prompts and seeds through several inference-time methods: what each gains, and what it costs."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..measure import peak_memory
from ..rewards.base import RewardModel
from ..rewards.sum import RewardSum
from ..sampling.checks import check_count
from ..sampling.prompt_file import Prompt, as_entries, expand_prompts, in_batches, read_prompts
from ..sampling.sample_prompts import call_arguments, draw
from ..sampling.settings import call_identity, difference, identity, pipe_identity, plain
from ..value.base import ValueEstimator, score_images
from .compare_report import Comparison

Measure = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
"""``(images [B, 3, H, W] in [0, 1], prompts) -> figures [B] by name``."""


@dataclass
class Contender:
    """One way of sampling: a name, an estimator (None for none), and what else :func:`guided_sample` is given."""

    name: str
    value: ValueEstimator | None
    options: dict[str, Any] = field(default_factory=dict)


def compare(
    pipe,
    contenders: Sequence[Contender],
    prompts: str | Path | Sequence[str | Prompt],
    rewards: Mapping[str, RewardModel | RewardSum],
    *,
    images_per_prompt: int = 1,
    prompts_per_batch: int = 4,
    seed: int = 0,
    measures: Measure | None = None,
    work_dir: str | Path | None = None,
    on_batch: Callable[[], None] | None = None,
    progress: bool = True,
    **common,
) -> Comparison:
    """Sample every prompt by every contender, in turns batch by batch, and measure pictures, evaluations and time.

    Image k of prompt p starts from the generator of ``seed + p * images_per_prompt + k`` in each of them, or of the
    prompt's own seed plus k.

    Args:
        pipe: a pipeline of images.
        contenders: with different names.
        prompts: a file or a list of P, see :func:`~stitchvm_ext.sampling.read_prompts`.
        rewards: clean rewards by name: the first is the target, the others nobody follows (held out).
        images_per_prompt: S; from two on, the diversity of a prompt's pictures is measured, as the mean distance
            (1 - cosine) of their embeddings by the last reward that has one.
        prompts_per_batch: prompts whose pictures are sampled together.
        measures: further figures of pictures.
        work_dir: keeps finished batches, so that an interrupted call goes on; removed by nobody.
        on_batch: called after each contender's part of a batch.
        common: of :func:`guided_sample`; a contender's own options win.

    Raises:
        TypeError, ValueError: no contenders, two of one name, options that :func:`guided_sample` does not have, no
            prompt, no reward, or a ``work_dir`` of another comparison.
    """
    names = [c.name for c in contenders]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"contenders: expected at least one, and different names, got {names}")
    if not rewards:
        raise ValueError("rewards: expected at least the target reward by name, got none")
    prompts = read_prompts(prompts)
    samples = expand_prompts(prompts, images_per_prompt, seed, negative_prompt="")
    check_count("prompts_per_batch", prompts_per_batch)
    batches = in_batches(samples, prompts_per_batch * images_per_prompt)
    arguments = [call_arguments({**common, **c.options}) for c in contenders]
    if any(of["num_frames"] != 1 for of in arguments):
        raise ValueError("num_frames: expected 1, pictures are compared")
    shelf = None
    if work_dir is not None:
        settings = {
            "contenders": [
                {"name": c.name, **call_identity(pipe, c.value, of)}
                for c, of in zip(contenders, arguments, strict=True)
            ],
            "pipe": pipe_identity(pipe),
            "rewards": [[name, identity(reward)] for name, reward in rewards.items()],
            "measures": measures,
            "prompts": as_entries(prompts),
            "images_per_prompt": images_per_prompt,
            "prompts_per_batch": prompts_per_batch,
            "seed": seed,
        }
        shelf = _shelf(Path(work_dir), json.loads(json.dumps(settings, default=plain)))
    parts: dict[str, list[dict]] = {name: [] for name in names}
    bar = tqdm(total=len(batches) * len(names), desc="compare", unit="batch", disable=not progress)
    for number, batch in enumerate(batches):
        texts = [sample.prompt for sample in batch]
        for position, contender in enumerate(contenders):
            kept = None if shelf is None else shelf / f"{number:05d}-{position:03d}.pt"
            if kept is not None and kept.exists():
                parts[contender.name].append(torch.load(kept, weights_only=True))
            else:
                with peak_memory(pipe.device) as peak:
                    began = time.perf_counter()
                    result = draw(pipe, contender.value, batch, output_type="pt", **{**common, **contender.options})
                    seconds = (time.perf_counter() - began) / len(batch)
                part = _measured(result.images.float().cpu(), texts, images_per_prompt, rewards, measures)
                part |= {"evaluations": asdict(result.evaluations), "seconds": seconds, "peak_bytes": peak.bytes}
                if kept is not None:
                    torch.save(part, kept.with_suffix(".partial"))
                    kept.with_suffix(".partial").replace(kept)
                parts[contender.name].append(part)
            bar.update()
            if on_batch:
                on_batch()
    bar.close()
    return Comparison(
        prompts=[prompt.prompt for prompt in prompts],
        images_per_prompt=images_per_prompt,
        target=next(iter(rewards)),
        figures={name: _put_together(of, images_per_prompt) for name, of in parts.items()},
        images={name: torch.cat([part["images"] for part in of]) for name, of in parts.items()},
    )


def _shelf(folder: Path, settings: dict[str, Any]) -> Path:
    """The folder of finished batches, of this very comparison."""
    path = folder / "comparison.json"
    if path.is_file():
        found = difference(json.loads(path.read_text()), settings)
        if found:
            name, theirs, ours = found
            raise ValueError(
                f"work_dir: {folder} has batches of another comparison, give another folder: {name}: expected "
                f"{theirs!r:.200}, got {ours!r:.200}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(settings, indent=1))
    partial.replace(path)
    return folder


@torch.no_grad()
def _measured(images: Tensor, texts: list[str], per_prompt: int, rewards, measures: Measure | None) -> dict[str, Any]:
    """Pictures as bytes, and their figures [B]; the diversity [prompts]."""
    figures = {name: score_images(reward, images.to(_device(reward)), tuple(texts)) for name, reward in rewards.items()}
    figures |= {} if measures is None else dict(measures(images, texts))
    part = {"images": (images * 255).round().byte(), "figures": {n: f.float().cpu() for n, f in figures.items()}}
    if per_prompt > 1:
        for reward in reversed(list(rewards.values())):
            if isinstance(reward, RewardModel) and hasattr(reward.output(images[:1].to(_device(reward))), "normalized"):
                embedding = reward.output(images.to(_device(reward))).normalized
                embedding = embedding.view(-1, per_prompt, embedding.shape[-1])
                cosines = (embedding @ embedding.mT).sum((1, 2)) - per_prompt
                part["diversity"] = (1 - cosines / (per_prompt * (per_prompt - 1))).cpu()
                break
    return part


def _device(reward) -> torch.device:
    return next(iter(reward.parameters())).device if isinstance(reward, torch.nn.Module) else torch.device("cpu")


def _put_together(parts: list[dict], per_prompt: int) -> dict[str, Any]:
    """Means with standard errors over prompts (None of one prompt), evaluations and seconds per image, the peak."""
    of_prompt = {
        name: torch.cat([part["figures"][name] for part in parts]).view(-1, per_prompt).mean(1)
        for name in parts[0]["figures"]
    }
    if "diversity" in parts[0]:
        of_prompt["diversity"] = torch.cat([part["diversity"] for part in parts])
    count = sum(len(part["images"]) for part in parts)
    kinds = parts[0]["evaluations"]
    return {
        "means": {name: x.double().mean().item() for name, x in of_prompt.items()},
        "standard_errors": {
            name: (x.double().std() / len(x) ** 0.5).item() if len(x) > 1 else None for name, x in of_prompt.items()
        },
        "evaluations_per_image": {k: sum(part["evaluations"][k] for part in parts) / count for k in kinds},
        "seconds_per_image": statistics.median(part["seconds"] for part in parts),
        "peak_bytes": max(part["peak_bytes"] for part in parts),
    }
