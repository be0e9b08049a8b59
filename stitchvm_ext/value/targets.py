"""What stage 2 learns from, computed once and kept on disk: clean latents and the teachers' outputs (METHOD.md §4,
"Ours").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..backbones import Encoding, backbone_of, stack_rows
from ..data import as_image_source
from ..rewards.base import RewardModel
from .processes import processes
from .sharded import ShardedTensors, ShardWriter, digest_of

SHARD_SIZE = 256


@dataclass
class DistillationTargets:
    """Rows over N images.

    Attributes:
        latents: ``latents``, z_0 float32 [C, H, W], and the images' captions. Of the generator's own rollouts also
            ``states`` [K, C, H, W], latents on the way, and ``sigmas`` [K], their noise levels.
        teachers: for every reward ``tokens``, its output tokens float16 [P+N', C'], and ``embeddings``, normalised,
            float32 [D].
        text: the backbone's encoding of every image's caption, if it was asked for.
        digest: of the images and of the networks that the rest was computed from.
    """

    latents: ShardedTensors
    teachers: list[ShardedTensors]
    text: ShardedTensors | None = None
    digest: str = field(init=False)

    def __post_init__(self):
        stores = [self.latents, *self.teachers, *filter(None, [self.text])]
        self.digest = digest_of({"stores": [store.digest for store in stores]})

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, index: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Latents of some images, and tokens and embeddings of every teacher, as they are stored."""
        rows = [teacher.rows(index) for teacher in self.teachers]
        return self.latents.rows(index)["latents"], [(r["tokens"], r["embeddings"]) for r in rows]

    def states(self, index: Tensor) -> tuple[Tensor, Tensor] | None:
        """Latents [B, K, C, H, W] on the way to some images, and their noise levels [B, K]; None for real images, which
        the forward process noises.
        """
        if "states" not in self.latents.names:
            return None
        rows = self.latents.rows(index)
        return rows["states"], rows["sigmas"]

    def encodings(self, index: Tensor) -> Encoding:
        """The backbone's encoding of the captions of some images."""
        return stack_rows([self.text.row(n) for n in index.tolist()])


def weights_hash(module: nn.Module) -> str:
    """A digest of a few entries of every weight: a network of the same shape with other weights has another. Of weights
    that are offloaded, and so not here to be read, the names count.
    """
    digest = hashlib.sha256()
    for name, t in module.state_dict().items():
        digest.update(name.encode())
        if not t.is_meta:
            digest.update(t.detach().flatten()[:: max(1, t.numel() // 16)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def denoiser_identity(denoiser: nn.Module) -> dict[str, str]:
    """What tells a denoiser from another: its weights, adapters among them, and how much each adapter counts."""
    adapters = [
        (name, sorted(module.scaling.items()), module.active_adapters, module.disable_adapters)
        for name, module in denoiser.named_modules()
        if hasattr(module, "scaling") and hasattr(module, "active_adapters")  # a LoRA layer of peft
    ]
    return {"weights": weights_hash(denoiser), "adapters": hashlib.sha256(repr(adapters).encode()).hexdigest()}


def vae_identity(vae) -> dict[str, Any]:
    """What tells an autoencoder from another."""
    # Of the configuration's own entries some are in another order in every process.
    settings = {name: setting for name, setting in vae.config.items() if not name.startswith("_")}
    return {**settings, "weights": weights_hash(vae)}


def text_encoders_identity(pipe) -> dict[str, str]:
    """What tells a pipeline's text encoders from others."""
    return {n: weights_hash(m) for n, m in pipe.components.items() if n.startswith("text_encoder") and m}


def teacher_writer(folder: Path, read: dict[str, Any], reward: RewardModel, shard_size: int) -> ShardWriter:
    """Where a teacher's outputs go: a folder of its own, whose identity is ``read`` and the reward."""
    identity = {**reward.describe(), "weights": weights_hash(reward)}
    name = f"{type(reward).__name__}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:8]}"
    return ShardWriter(folder / name, {**read, "reward": identity}, shard_size)


def teacher_output(reward: RewardModel, images: Tensor) -> dict[str, Tensor]:
    """What is stored of a teacher's output for images [B, 3, H, W] in [0, 1], on the CPU."""
    output = reward.output(images.to(reward.device))
    return {"tokens": output.tokens.half().cpu(), "embeddings": output.normalized.cpu()}


def check_finite_rows(rows: dict[str, Tensor], names: Sequence[str]) -> None:
    """Raises FloatingPointError, with the name of the first row that is not finite."""
    for name, values in rows.items():
        finite = values.flatten(1).isfinite().all(1)
        if not finite.all():
            bad = names[int((~finite).nonzero()[0])]
            raise FloatingPointError(f"images: the {name} of {bad} are not finite in {values.dtype}")


@torch.no_grad()
def cache_targets(
    folder: str | Path,
    pipe,
    rewards: RewardModel | Sequence[RewardModel],
    images: Any,
    *,
    skip: int = 0,
    batch_size: int = 16,
    shard_size: int = SHARD_SIZE,
    text_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> DistillationTargets:
    """Compute the targets of images into a folder, or reopen them from there.

    The images are read once, and only those whose latents or targets are missing are decoded: an interrupted call goes
    on at the next shard, and another reward for the same images leaves the latents as they are. Several processes share
    the shards among them.

    Args:
        folder: receives ``latents/``, a folder per reward, and ``text/``, each with shards and a manifest.json.
        images: as for :func:`stitchvm_ext.data.as_image_source`.
        skip: images at the beginning that are left out.
        text_options: of the backbone's text encoding; with them the images' captions are encoded as well.

    Raises:
        ValueError: no image, or one without a caption where they are to be encoded.
        OSError, ValueError: an image that cannot be read, or of another size than the others; names it.
        FloatingPointError: latents or targets of an image that are not finite in their stored precision; names it.
    """
    rewards = [rewards] if isinstance(rewards, RewardModel) else list(rewards)
    folder, source, backbone = Path(folder), as_image_source(images), backbone_of(pipe)
    state = processes(backbone.device)
    read = {"images": source.identity(), "size": source.image_size, "skip": skip}

    def encode(x: Tensor) -> dict[str, Tensor]:
        return {"latents": backbone.encode_images(pipe.vae, x.to(pipe.vae.device))}

    tasks = [(ShardWriter(folder / "latents", {**read, "vae": vae_identity(pipe.vae)}, shard_size), encode)]
    for reward in rewards:
        tasks.append((teacher_writer(folder, read, reward, shard_size), partial(teacher_output, reward)))

    if not all(writer.is_complete() for writer, _ in tasks):
        records = source.records(skip)
        bar = tqdm(desc="teacher targets", unit="image", disable=not (progress and state.is_main_process))
        total = 0
        for shard in count():
            chunk = list(islice(records, shard_size))
            if not chunk:
                break
            total += len(chunk)
            if shard % state.num_processes == state.process_index:
                missing = [task for task in tasks if not task[0].has(shard)]
                _write_shard(shard, missing, source, chunk, batch_size)
            bar.update(len(chunk))
        bar.close()
        if not total:
            raise ValueError(f"images: expected more than the {skip} that are left out, got no other")
        state.wait_for_everyone()
        if state.is_main_process:
            for writer, _ in tasks:
                writer.finish(total)
        state.wait_for_everyone()
    latents, *teachers = (ShardedTensors(writer.folder) for writer, _ in tasks)
    text = None
    if text_options is not None:
        text = cache_text(folder / "text", pipe, latents, text_options, progress)
    return DistillationTargets(latents, teachers, text)


def _write_shard(shard: int, tasks: list, source, records: list, batch_size: int) -> None:
    """Decode the images of a shard once and write what is missing of it."""
    found: list[list[dict[str, Tensor]]] = [[] for _ in tasks]
    for start in range(0, len(records) if tasks else 0, batch_size):
        batch = records[start : start + batch_size]
        images = source.load(batch)
        for (_, compute), parts in zip(tasks, found, strict=True):
            rows = {name: value.cpu() for name, value in compute(images).items()}
            check_finite_rows(rows, [record.name for record in batch])
            parts.append(rows)
    for (writer, _), parts in zip(tasks, found, strict=True):
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        writer.write(shard, rows, [record.caption for record in records])


def cache_text(folder: Path, pipe, latents: ShardedTensors, options: dict, progress: bool) -> ShardedTensors:
    """The backbone's encodings of the captions that were stored with the latents; texts of one shard are padded to one
    length.
    """
    backbone = backbone_of(pipe)
    state = processes(backbone.device)
    read = {"captions": latents.digest, "options": options, "encoders": text_encoders_identity(pipe)}
    writer = ShardWriter(folder, read, latents.shard_size)
    if not writer.is_complete():
        texts = latents.texts()
        bare = next((n for n, text in enumerate(texts) if text is None), None)
        if bare is not None:
            raise ValueError(f"images: expected a caption for every image, got none for training image {bare}")
        starts = list(enumerate(range(0, len(texts), writer.shard_size)))[state.process_index :: state.num_processes]
        for shard, start in tqdm(starts, desc="captions", disable=not (progress and state.is_main_process)):
            if not writer.has(shard):
                part = texts[start : start + writer.shard_size]
                rows = [backbone.encode_text(pipe, part[n : n + 16], **options) for n in range(0, len(part), 16)]
                writer.write(shard, stack_rows(rows))
        state.wait_for_everyone()
        if state.is_main_process:
            writer.finish(len(texts))
        state.wait_for_everyone()
    return ShardedTensors(folder)
