"""From a pipeline, rewards and unlabelled images to stitched value models: both stages in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones import backbone_of
from ..backbones.distilled import warn_if_few_step
from ..backbones.identity import latent_space
from ..data import ImageSource, as_image_source
from ..rewards.base import RewardModel, skip_blocks
from ..rewards.sum import RewardSum
from .finetune import FinetuneConfig, finetune
from .processes import from_main, processes
from .search import MAX_LAYER, SearchResult, check_tokens, search_stitch
from .stitch_layer import StitchLayer
from .stitched import StitchedValue
from .targets import cache_targets


def untrained_value(
    pipe,
    reward: RewardModel,
    search: SearchResult,
    depth: int,
    layer: int,
    latent_size,
    null_condition,
    text_options,
    prompt_conditioned: bool = False,
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
        prompt_conditioned=prompt_conditioned,
        latent_space=latent_space(backbone, pipe),
        details={"closed-form mse": candidate.mse, "closed-form fraction unexplained": candidate.unexplained},
    )
    return value.to(backbone.device).eval().requires_grad_(False)


def encode_probe(pipe, source: ImageSource, count: int, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """What :func:`search_stitch` reads: the first ``count`` images [N, 3, H, W] in [0, 1] and their latents."""
    backbone = backbone_of(pipe)
    images = source.load(list(islice(source.records(), count)))
    latents = [backbone.encode_images(pipe.vae, part.to(pipe.vae.device)) for part in images.split(batch_size)]
    return images, torch.cat(latents)


def stitch(
    pipe,
    reward: RewardModel | Sequence[RewardModel],
    images: Any,
    *,
    depth: int | None = None,
    layer: int | None = None,
    tokens: str = "fitted",
    work_dir: str | Path,
    size: int | Sequence[int] | None = None,
    probe_images: int = 200,
    config: FinetuneConfig | None = None,
    text_options: dict[str, Any] | None = None,
    backbone_licence: str | None = None,
    progress: bool = True,
) -> StitchedValue | list[StitchedValue]:
    """Stitch a reward onto a pipeline's frozen backbone (METHOD.md §3 and §4), or several of them at once.

    The first ``probe_images`` images serve the closed-form search alone; the others train. ``work_dir`` receives the
    search's table (search.json, search.png), the cached targets and the resumable state: the same call after an
    interruption goes on where it stopped. Save the result with ``value.save_pretrained(folder)``.

    Under ``torchrun`` or ``accelerate launch`` all processes make the same call, each with the pipeline and rewards on
    its own device, and share the work; ``work_dir`` must be one folder for all.

    Args:
        pipe: a diffusers pipeline with ``transformer``, ``vae`` and text encoders.
        reward: the clean reward; it stays untouched and serves as teacher. Of several, each gets a value of its own,
            and training runs the backbone once for all.
        images: a tensor [N, 3, H, W], uint8 or float in [0, 1]; PIL images; a folder; paths of image files; a
            ``datasets.Dataset`` or ``IterableDataset``; webdataset shards ("shards/{000..009}.tar"); or an
            :class:`stitchvm_ext.data.ImageSource`. They are streamed. Captions beside them (see there) are read with
            ``config.prompt_share``.
        depth: i, backbone blocks kept; 0 for the baseline without the backbone; None for the search's pick.
        layer: j, the reward block entered; None for the search's pick.
        tokens: position and class tokens at j > 1, "fitted" or "literal", see :func:`search_stitch`.
        size: (height, width) in pixels, or one number, that images are resized and centre-cropped to: the resolution to
            be sampled at. None takes images as they are, which must then have one size.
        config: settings of stage 2.
        text_options: of the backbone's text encoding, e.g. ``{"max_sequence_length": 256}`` for SD3.
        backbone_licence: of the pipeline's weights, for the model card (a reward brings its own).

    Returns:
        the value of the reward, or a list of values in the order of the rewards.
    Raises:
        ValueError, TypeError: an argument does not fit; before any work starts.
        OSError: an image that cannot be read; names it.
    """
    config = config or FinetuneConfig()
    rewards = list(reward) if isinstance(reward, list | tuple) else [reward]
    source, work_dir = as_image_source(images, size), Path(work_dir)
    backbone = backbone_of(pipe)
    _check_rewards(rewards, layer)
    check_tokens(tokens)
    if depth is not None and depth != 0:
        backbone.check_depth(depth)
    latent_size = _check_images(backbone, pipe, source, probe_images, config)
    state = processes(backbone.device)
    config.check_processes(state.num_processes)
    warn_if_few_step(pipe, backbone.denoiser)

    text_options = dict(text_options or {})
    null_condition = backbone.null_condition(pipe, **text_options)
    probe, latents = encode_probe(pipe, source, probe_images, config.encode_batch_size)
    progress = progress and state.is_main_process
    values, searches = [], []
    for number, one in enumerate(rewards):
        layers = sorted({layer or 1, *range(1, min(MAX_LAYER, one.num_layers) + 1)})
        search = search_stitch(
            backbone,
            one,
            latents,
            probe,
            null_condition,
            layers=layers,
            tokens=tokens,
            seed=config.seed,
            progress=progress,
        )
        if state.is_main_process:
            search.save(work_dir if len(rewards) == 1 else work_dir / f"search_{number}")
        i, j = from_main(state, _pick(search, depth, layer))
        with torch.random.fork_rng(devices=[]):  # the stitch's MLP has random weights before its zero layer
            torch.manual_seed(config.seed)
            value = untrained_value(
                pipe, one, search, i, j, latent_size, null_condition, text_options, config.prompt_share > 0
            )
        values.append(value)
        searches.append(search)
    targets = cache_targets(
        work_dir / "targets",
        pipe,
        rewards,
        source,
        skip=probe_images,
        batch_size=config.encode_batch_size,
        text_options=text_options if config.prompt_share else None,
        progress=progress,
    )
    cuts = "_".join(f"i{value.depth}_j{value.layer}" for value in values) + "_literal" * (tokens == "literal")
    losses = finetune(values, rewards, targets, config, state_path=work_dir / f"state_{cuts}.pt", progress=progress)
    for value, search, terms in zip(values, searches, losses, strict=True):
        value.backbone_licence = backbone_licence
        value.details |= {
            "training images": len(targets),
            "training steps": config.epochs * (len(targets) // config.batch_size),
            **({"share of prompted batches": config.prompt_share} if config.prompt_share else {}),
            **{f"final {name} loss": math.nan if not means else means[-1] for name, means in terms.items()},
            "closed-form search": search.summary(),
            "training settings": asdict(config),
        }
    return values if isinstance(reward, list | tuple) else values[0]


def _check_rewards(rewards: list[RewardModel], layer: int | None) -> None:
    if not rewards:
        raise ValueError("reward: expected at least one, got none")
    for reward in rewards:
        if not isinstance(reward, RewardModel):
            hint = "; stitch each reward of a sum and add their values with ValueSum" * isinstance(reward, RewardSum)
            raise TypeError(f"reward: expected a stitchvm_ext.rewards.RewardModel, got {type(reward).__name__}{hint}")
        if layer is not None:
            reward.check_layer(layer)


def _check_images(backbone, pipe, source: ImageSource, probe_images: int, config: FinetuneConfig) -> tuple[int, int]:
    """(H, W) of the images' latents; raises where there are too few images, of a wrong size, or without captions."""
    needed = probe_images + config.batch_size
    count = source.count(needed)
    if probe_images < 8:
        raise ValueError(f"probe_images: expected at least 8, got {probe_images}")
    if count < needed:
        raise ValueError(f"images: expected at least probe_images + batch_size = {needed}, got {count}")
    if config.prompt_share and next(source.records(probe_images)).caption is None:
        raise ValueError("images: expected a caption for every image (prompt_share), got none")
    latent_size = backbone.latent_size(pipe, *source.image_size)
    backbone.grid(latent_size)
    return latent_size


def _pick(search: SearchResult, depth: int | None, layer: int | None) -> tuple[int, int]:
    """The cell (i, j) of the search's pick, as far as it is not given."""
    depth = search.best.depth if depth is None else depth
    if layer is None:
        layer = min((c for c in search.candidates.values() if c.depth == depth), key=lambda c: c.mse).layer
    return depth, layer
