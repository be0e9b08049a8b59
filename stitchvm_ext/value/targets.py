"""What stage 2 learns from, computed once and kept on disk: clean latents and the teacher's outputs (METHOD.md §4,
"Ours").
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange

from ..backbones.latents import encode_images
from ..rewards.base import RewardModel


@dataclass
class DistillationTargets:
    """Memory-mapped arrays over N images.

    Attributes:
        latents: z_0 float32 [N, C, H, W].
        tokens: the teacher's output tokens float16 [N, P+N', C'].
        embeddings: the teacher's normalised embeddings float32 [N, D].
        digest: of the images and of the networks that the rest was computed from.
    """

    latents: np.ndarray
    tokens: np.ndarray
    embeddings: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, tokens and embeddings of some images, float32 on a device."""
        rows = index.numpy()
        return tuple(torch.from_numpy(a[rows]).float().to(device) for a in (self.latents, self.tokens, self.embeddings))


def _images_hash(images: Tensor) -> str:
    """A digest of the images' shape and of a thousandth of their bytes, spread over all of them."""
    values = images.reshape(-1)[:: max(1, images.numel() // 100_000)]
    return hashlib.sha256(str(tuple(images.shape)).encode() + values.cpu().numpy().tobytes()).hexdigest()


def _weights_hash(module: nn.Module) -> str:
    """A digest of a few entries of every weight: a network of the same shape with other weights has another."""
    digest = hashlib.sha256()
    for name, t in module.state_dict().items():
        values = t.detach().flatten()[:: max(1, t.numel() // 16)]
        digest.update(name.encode() + values.double().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def cache_targets(
    folder: str | Path, vae, reward: RewardModel, images: Tensor, *, batch_size: int = 64, progress: bool = True
) -> DistillationTargets:
    """Compute the targets of images [N, 3, H, W] (uint8, or float in [0, 1]) into a folder, or reopen them from there.

    The manifest is written last; without it, or for other images or another reward, the folder is computed anew.
    """
    folder = Path(folder)
    manifest = {
        "images": _images_hash(images),
        "reward": {**reward.describe(), "weights": _weights_hash(reward)},
        "vae": {**vae.config, "weights": _weights_hash(vae)},
    }
    manifest = json.loads(json.dumps(manifest, default=str))
    paths = {name: folder / f"{name}.npy" for name in ("latents", "tokens", "embeddings")}
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file() or json.loads(manifest_path.read_text()) != manifest:
        folder.mkdir(parents=True, exist_ok=True)
        manifest_path.unlink(missing_ok=True)
        arrays: dict[str, np.ndarray] = {}
        for start in trange(0, len(images), batch_size, desc="teacher targets", disable=not progress):
            x = as_unit_images(images[start : start + batch_size])
            output = reward.output(x.to(reward.device))
            rows = {
                "latents": encode_images(vae, x.to(vae.device)),
                "tokens": output.tokens.half(),
                "embeddings": output.normalized,
            }
            for name, value in rows.items():
                value = value.cpu().numpy()
                if name not in arrays:
                    shape = (len(images), *value.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(paths[name], mode="w+", dtype=value.dtype, shape=shape)
                arrays[name][start : start + len(value)] = value
        for array in arrays.values():
            array.flush()
        partial = manifest_path.with_suffix(".partial")
        partial.write_text(json.dumps(manifest, indent=1))
        partial.replace(manifest_path)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return DistillationTargets(**{n: np.load(path, mmap_mode="r") for n, path in paths.items()}, digest=digest)


def as_unit_images(images: Tensor) -> Tensor:
    """uint8 in 0..255 or float in [0, 1] -> float in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
