"""Training latents from the generator's own rollouts: z_t along a trajectory, with the reward at its end.

The forward process noises real images; a generator that is imperfect, or carries a LoRA, passes through other latents,
and ends at other images, than that. What it passes through itself is what a value sees while it guides.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..backbones import Condition, DiffusionBackbone, backbone_of
from ..backbones.base import frozen
from ..rewards.base import RewardModel
from .batches import seeded_generator
from .processes import processes
from .sharded import ShardedTensors, ShardWriter, shard_path
from .targets import (
    SHARD_SIZE,
    DistillationTargets,
    cache_text,
    check_finite_rows,
    denoiser_identity,
    teacher_output,
    teacher_writer,
    text_encoders_identity,
    vae_identity,
)


@torch.no_grad()
def cache_rollouts(
    folder: str | Path,
    pipe,
    rewards: RewardModel | Sequence[RewardModel],
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 28,
    guidance_scale: float = 7.0,
    transition: str = "ode",
    states: int = 4,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    shard_size: int = SHARD_SIZE,
    text_options: dict[str, Any] | None = None,
    prompt_conditioned: bool = False,
    progress: bool = True,
) -> DistillationTargets:
    """Sample one image per prompt and cache what :func:`finetune` learns from, or reopen it from ``folder``.

    An interrupted call goes on at the next shard; several processes share the shards. Every row's noise follows from
    (seed, row).

    Args:
        pipe: a pipeline of images; its denoiser as it is now, adapters included, is the policy.
        prompts: N texts, a row each; they also become the rows' captions.
        guidance_scale: classifier-free guidance of the rollouts, as :func:`guided_sample` reads it.
        transition: "ode", "linear_sde" or "flow_grpo".
        states: how many latents of a trajectory are kept, at levels drawn for each row; a training step reads one.
        text_options: of the backbone's text encoding; give those of the value that will be trained.
        prompt_conditioned: also keep the encodings of the prompts, for ``FinetuneConfig.prompt_share``.

    Raises:
        ValueError, TypeError: an argument does not fit; before any work.
        FloatingPointError: latents or targets that are not finite; names the prompt.
    """
    from ..sampling.checks import as_prompts, check_count, check_guidance_scale
    from ..sampling.schedule import pipeline_sigmas
    from ..sampling.transitions import get_transition

    rewards = [rewards] if isinstance(rewards, RewardModel) else list(rewards)
    backbone, folder, prompts = backbone_of(pipe), Path(folder), as_prompts("prompts", prompts)
    if backbone.is_video:
        raise ValueError(f"pipe: expected a pipeline of images, got one of videos ({type(backbone).__name__})")
    check_guidance_scale(guidance_scale)
    for name, number in (("num_inference_steps", num_inference_steps), ("batch_size", batch_size)):
        check_count(name, number)
    if not 1 <= states <= num_inference_steps:
        raise ValueError(f"states: expected 1 to {num_inference_steps} of a trajectory's latents, got {states}")
    step, text_options = get_transition(transition), dict(text_options or {})
    latent_size = backbone.latent_size(pipe, height, width)
    sigmas = pipeline_sigmas(pipe, backbone, num_inference_steps, latent_size)

    state = processes(backbone.device)
    read = {
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "denoiser": denoiser_identity(backbone.denoiser),
        "encoders": text_encoders_identity(pipe), "vae": vae_identity(pipe.vae), "text_options": text_options,
        "sigmas": sigmas.tolist(), "guidance_scale": guidance_scale, "transition": transition, "states": states,
        "size": list(latent_size), "seed": seed,
    }  # fmt: skip
    latents = ShardWriter(folder / "latents", read, shard_size)
    teachers = [(reward, teacher_writer(folder, read, reward, shard_size)) for reward in rewards]
    writers = [latents, *(writer for _, writer in teachers)]
    if not all(writer.is_complete() for writer in writers):
        starts = list(enumerate(range(0, len(prompts), shard_size)))[state.process_index :: state.num_processes]
        bar = tqdm(total=len(prompts), desc="rollouts", unit="image", disable=not (progress and state.is_main_process))
        for shard, start in starts:
            rows = range(start, min(start + shard_size, len(prompts)))
            texts = [prompts[r] for r in rows]
            if not latents.has(shard):
                parts = []
                for first in range(0, len(rows), batch_size):
                    part = rows[first : first + batch_size]
                    condition = _condition(pipe, backbone, [prompts[r] for r in part], guidance_scale, text_options)
                    parts.append(_roll_out(backbone, condition, sigmas, step, latent_size, states, seed, part))
                    check_finite_rows(parts[-1], [repr(prompts[r]) for r in part])
                latents.write(shard, {n: torch.cat([p[n] for p in parts]) for n in parts[0]}, texts)
            _teach(pipe, backbone, shard, [t for t in teachers if not t[1].has(shard)], latents, texts, batch_size)
            bar.update(len(rows))
        bar.close()
        state.wait_for_everyone()
        if state.is_main_process:
            for writer in writers:
                writer.finish(len(prompts))
        state.wait_for_everyone()
    clean, *found = (ShardedTensors(writer.folder) for writer in writers)
    text = cache_text(folder / "text", pipe, clean, text_options, progress) if prompt_conditioned else None
    return DistillationTargets(clean, found, text)


def _condition(
    pipe, backbone: DiffusionBackbone, prompts: list[str], guidance_scale: float, options: dict
) -> Condition:
    from ..sampling.encoding import encode_condition, split_guidance

    scale, options = split_guidance(backbone, guidance_scale, 1.0, options)
    return encode_condition(pipe, backbone, prompts, [""] * len(prompts), scale, options)


def _roll_out(
    backbone: DiffusionBackbone, condition: Condition, sigmas: Tensor, step, latent_size, states: int, seed: int, rows
) -> dict[str, Tensor]:
    """Rows of trajectories: their ends z_0 [B, C, H, W], some states before [B, states, C, H, W] and these states'
    noise levels [B, states].
    """
    from ..sampling.transitions import ode

    generators = [seeded_generator(seed, row) for row in rows]
    shape = (backbone.latent_channels, *latent_size)
    draw = lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(backbone.device)  # noqa: E731
    steps = len(sigmas) - 1
    kept = torch.stack([torch.randperm(steps, generator=g)[:states] for g in generators])  # [B, states]
    found = torch.empty(len(rows), states, *shape)
    z = backbone.process.flow_latents(draw(), sigmas[:1].to(backbone.device))
    with frozen(backbone.denoiser), backbone.fused():
        for number, (now, after) in enumerate(itertools.pairwise(sigmas.tolist())):
            row, slot = (kept == number).nonzero(as_tuple=True)
            found[row, slot] = z[row.to(z.device)].cpu()
            velocity = backbone.guided_velocity(z, now, condition).float()
            z = step(z, velocity, now, after, None if step is ode else draw()).float()
    return {"latents": z.cpu(), "states": found, "sigmas": sigmas[kept]}


def _teach(pipe, backbone, shard: int, teachers: list, latents: ShardWriter, prompts: list[str], batch_size: int):
    """Decode the ends of a shard's trajectories and write what the teachers say of them."""
    from safetensors.torch import load_file

    if not teachers:
        return
    ends = load_file(shard_path(latents.folder, shard))["latents"]
    found: list[list[dict[str, Tensor]]] = [[] for _ in teachers]
    for first in range(0, len(ends), batch_size):
        z = ends[first : first + batch_size].to(backbone.device)
        images = backbone.decode_latents(pipe.vae, z).clamp(0, 1)
        for (reward, _), parts in zip(teachers, found, strict=True):
            parts.append(teacher_output(reward, images))
            check_finite_rows(parts[-1], [repr(p) for p in prompts[first : first + batch_size]])
    for (_, writer), parts in zip(teachers, found, strict=True):
        writer.write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, prompts)
