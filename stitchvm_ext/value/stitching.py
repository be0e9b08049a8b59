"""From a pipeline, a reward and unlabelled images to a stitched value model: both stages in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones import backbone_of
from ..backbones.distilled import warn_if_few_step
from ..backbones.identity import latent_space
from ..rewards.base import RewardModel, skip_blocks
from ..rewards.sum import RewardSum
from .finetune import FinetuneConfig, finetune
from .search import MAX_LAYER, SearchResult, check_tokens, search_stitch
from .stitch_layer import StitchLayer
from .stitched import StitchedValue
from .targets import as_unit_images, cache_targets


def as_image_tensor(images: Tensor | Sequence[Any]) -> Tensor:
    """Images [N, 3, H, W], uint8 or float in [0, 1], from such a tensor or from PIL images of one size."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape [N, 3, H, W], got {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images: expected uint8 or floating point, got {images.dtype}")
        if images.is_floating_point() and images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"images: expected floats in [0, 1], got {images.min().item():g}..{images.max().item():g}")
        return images
    import numpy as np
    from PIL import Image

    images = list(images)
    for number, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"images: expected a tensor [N, 3, H, W] or PIL images, got {type(image).__name__} at position {number}"
            )
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images: expected images of one size, got the sizes {sorted(sizes)}")
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])


def untrained_value(
    pipe, reward: RewardModel, search: SearchResult, depth: int, layer: int, latent_size, null_condition, text_options
) -> StitchedValue:
    """A stitched value whose stitch is the closed form of a search, before any finetuning."""
    candidate = search.at(depth, layer)
    stitch = StitchLayer(
        in_width=candidate.weight.shape[1],
        out_width=candidate.weight.shape[0],
        out_grid=reward.grid,
        num_prefix_tokens=0 if candidate.prefix is None else len(candidate.prefix),
        with_position=candidate.bias.ndim == 2,
    )
    stitch.load_least_squares(candidate.weight, candidate.bias, candidate.prefix)
    backbone = backbone_of(pipe)
    value = StitchedValue(
        backbone,
        stitch,
        skip_blocks(reward.suffix(1), layer) if search.tokens == "literal" else reward.suffix(layer),
        depth=depth,
        layer=layer,
        tokens=search.tokens,
        latent_size=latent_size,
        null_condition=null_condition,
        text_options=text_options,
        latent_space=latent_space(backbone, pipe),
        details={"closed-form mse": candidate.mse, "closed-form fraction unexplained": candidate.unexplained},
    )
    return value.to(backbone.device).eval().requires_grad_(False)


def stitch(
    pipe,
    reward: RewardModel,
    images: Tensor | Sequence[Any],
    *,
    depth: int | None = None,
    layer: int | None = None,
    tokens: str = "fitted",
    work_dir: str | Path,
    probe_images: int = 200,
    config: FinetuneConfig | None = None,
    text_options: dict[str, Any] | None = None,
    backbone_licence: str | None = None,
    progress: bool = True,
) -> StitchedValue:
    """Stitch a reward onto a pipeline's frozen backbone (METHOD.md §3 and §4).

    The last ``probe_images`` images serve the closed-form search alone; the others train. ``work_dir`` receives the
    search's table (search.json, search.png), the cached targets and the resumable state: the same call after an
    interruption goes on where it stopped. Save the result with ``value.save_pretrained(folder)``.

    Args:
        pipe: a diffusers pipeline with ``transformer``, ``vae`` and text encoders.
        reward: the clean reward; it stays untouched and serves as teacher.
        images: [N, 3, H, W] uint8 or float in [0, 1], or PIL images of one size: the resolution to be sampled at.
        depth: i, backbone blocks kept; 0 for the baseline without the backbone; None for the search's pick.
        layer: j, the reward block entered; None for the search's pick.
        tokens: position and class tokens at j > 1, "fitted" or "literal", see :func:`search_stitch`.
        config: settings of stage 2.
        text_options: of the backbone's text encoding, e.g. ``{"max_sequence_length": 256}`` for SD3.
        backbone_licence: of the pipeline's weights, for the model card (a reward brings its own).

    Raises:
        ValueError, TypeError: an argument does not fit; before any work starts.
    """
    config = config or FinetuneConfig()
    images = as_image_tensor(images)
    backbone = backbone_of(pipe)
    if not isinstance(reward, RewardModel):
        hint = "; stitch each reward of a sum and add their values with ValueSum" * isinstance(reward, RewardSum)
        raise TypeError(f"reward: expected a stitchvm_ext.rewards.RewardModel, got {type(reward).__name__}{hint}")
    if depth is not None and depth != 0:
        backbone.check_depth(depth)
    if layer is not None:
        reward.check_layer(layer)
    check_tokens(tokens)
    if not 8 <= probe_images < len(images):
        raise ValueError(
            f"probe_images: expected 8 to {len(images) - 1}, leaving images to train on, got {probe_images}"
        )
    if len(images) - probe_images < config.batch_size:
        raise ValueError(
            f"images: expected at least probe_images + batch_size = {probe_images + config.batch_size}, "
            f"got {len(images)}"
        )
    warn_if_few_step(pipe, backbone.denoiser)
    work_dir = Path(work_dir)

    text_options = dict(text_options or {})
    null_condition = backbone.null_condition(pipe, **text_options)
    probe = as_unit_images(images[-probe_images:])
    latents = torch.cat(
        [backbone.encode_images(pipe.vae, x.to(pipe.vae.device)) for x in probe.split(config.batch_size)]
    )
    layers = sorted({layer or 1, *range(1, min(MAX_LAYER, reward.num_layers) + 1)})
    search = search_stitch(
        backbone,
        reward,
        latents,
        probe,
        null_condition,
        layers=layers,
        tokens=tokens,
        seed=config.seed,
        progress=progress,
    )
    search.save(work_dir)
    depth = search.best.depth if depth is None else depth
    if layer is None:
        layer = min((c for c in search.candidates.values() if c.depth == depth), key=lambda c: c.mse).layer

    value = untrained_value(pipe, reward, search, depth, layer, tuple(latents.shape[-2:]), null_condition, text_options)
    targets = cache_targets(work_dir / "targets", pipe.vae, reward, images[:-probe_images], progress=progress)
    state_path = work_dir / f"state_i{depth}_j{layer}{'_literal' if tokens == 'literal' else ''}.pt"
    losses = finetune(value, reward, targets, config, state_path=state_path, progress=progress)
    value.backbone_licence = backbone_licence
    value.details |= {
        "training images": len(targets),
        "training steps": config.epochs * (len(targets) // config.batch_size),
        **{f"final {name} loss": math.nan if not terms else terms[-1] for name, terms in losses.items()},
        "closed-form search": search.summary(),
        "training settings": asdict(config),
    }
    return value
