"""``guided_sample``: from prompts to images under a value estimator, by any of the inference-time methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..backbones import Condition, DiffusionBackbone, backbone_of
from ..backbones.base import frozen
from ..backbones.distilled import warn_if_few_step
from ..measure import Evaluations, Stopwatch, count_evaluations
from ..rewards.base import RewardModel
from ..rewards.sum import RewardSum
from ..value.base import ValueEstimator, score_images
from .checks import as_prompts, check_count, check_guidance_scale, check_value
from .denoiser import Denoiser
from .encoding import as_condition, as_negative_prompts, encode_condition, split_guidance, text_options_of
from .hook import is_guided
from .memory import LEVELS, MemoryReport, MemorySaving, low_memory, tiled_decode
from .methods import get_method, make_options
from .noise import Noise, per_sample_generators
from .schedule import pipeline_sigmas
from .task import SamplingTask
from .transitions import Transition, get_transition

OUTPUT_TYPES = ("pil", "pt", "np", "latent")


@dataclass
class GuidedSampleOutput:
    """What :func:`guided_sample` returns for B samples of K particles in T steps.

    Attributes:
        images: B PIL images; for "pt" a tensor [B, 3, H, W] and for "np" an array [B, H, W, 3], both in [0, 1]; for
            "latent" the latents. Of video models B lists of F images, [B, F, 3, H, W] and [B, F, H, W, 3].
        latents: final latents, float32 [B, C, h, w] (video: [B, C, T, h, w]), in flow coordinates.
        values: float32 [T, B] on the CPU: the latest value that a step asked for, of z_t before the step (at
            ``sigmas[k]``) where its gradient guides, the mean of the particles' after it elsewhere; NaN where none was.
        sigmas: noise levels, float32 [T+1].
        rewards: of the particles, float32 [B, K]; NaN where a method needs none and no reward was given.
        particles: latents of all particles [B, K, ...].
        log_weights: float64 [B, K], of particle methods, 0 elsewhere.
        log_evidence: float64 [B]: log of an unbiased estimate of ``E exp(scale reward)``, by "fk" with a scale and one
            proposal per particle; NaN elsewhere.
        timings: wall-clock seconds by phase ("encode", "sample", "decode") and in all ("total").
        evaluations: how often the denoiser, a prefix by itself, the value and the decoder ran.
        memory_report: what the measures of ``memory="low"`` spared, each with a note; empty otherwise.
    """

    images: Any
    latents: Tensor
    values: Tensor
    sigmas: Tensor
    rewards: Tensor
    particles: Tensor = field(repr=False)
    log_weights: Tensor
    log_evidence: Tensor
    timings: dict[str, float]
    evaluations: Evaluations
    memory_report: list[MemorySaving] = field(default_factory=list)

    @property
    def seconds_per_image(self) -> float:
        return self.timings["total"] / len(self.latents)

    @property
    def valued_steps(self) -> int:
        """Steps at which the value was asked."""
        return int((~self.values.isnan()).any(1).sum())


def guided_sample(
    pipe,
    value: ValueEstimator | None,
    prompt: str | list[str] | None = None,
    *,
    condition: Condition | None = None,
    method: str = "dps",
    reward: RewardModel | RewardSum | None = None,
    negative_prompt: str | list[str] = "",
    num_inference_steps: int = 28,
    guidance_scale: float = 7.0,
    true_cfg_scale: float = 1.0,
    transition: str | Transition | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    num_frames: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: Tensor | None = None,
    batch_size: int | None = None,
    max_sequence_length: int | None = None,
    memory: str = "normal",
    output_type: str = "pil",
    progress: bool = True,
    **options,
) -> GuidedSampleOutput:
    """Sample a pipeline's images under a value estimator, by one of the inference-time methods (METHOD.md §5).

    - ``method="dps"``: the value's gradient bends every step (:class:`~stitchvm_ext.sampling.Guidance`);
    - ``"fk"``: particles, weighed and resampled, optionally with several proposals each
      (:class:`~stitchvm_ext.sampling.FK`); ``"dps+fk"``: these with guided proposals, corrected for in the weights;
    - ``"best_of_n"``: several samples, the best is kept (:class:`~stitchvm_ext.sampling.BestOfN`);
    - ``"svdd"``: one latent, the best of several proposals at every step (:class:`~stitchvm_ext.sampling.SVDD`);
    - ``"search"``: proposals until one improves the value, within a budget (:class:`~stitchvm_ext.sampling.Search`).

    The pipeline's own text encoders, noise levels, classifier-free guidance and autoencoder are used; with
    ``value=None`` or ``strength=0``, and ``transition="ode"``, the result is the pipeline's own with a first-order
    solver (Euler on flows, DDIM on DDPM models, down to noise level 0), to float rounding. A sample does not depend on
    the samples beside it: texts are encoded one by one, norms are per sample, and every sample has its own generator.

    Args:
        pipe: a diffusers pipeline whose transformer or U-Net has a backbone adapter.
        value: any estimator on this pipeline's denoiser; None samples without one. A stitched value may also be one on
            another backbone with the same latent space (SD 3.5 Medium's for Large), which runs beside it.
        prompt: P texts; B = P * num_images_per_prompt samples, those of one prompt next to each other.
        condition: in place of prompts, their encodings: of :func:`encode_prompts`, or a
            :class:`~stitchvm_ext.backbones.Condition` of prompt embeddings. It brings its own prompts, negative prompts
            and guidance scale, which are not given beside it, and the pipeline needs no text encoder.
        reward: scores the finished images: the exact last weight of "fk", the choice of "best_of_n". Without one the
            value is asked at noise level 0; a Tweedie or Monte-Carlo value is the reward there.
        negative_prompt: one text for all or one per prompt. With "" (the null text) a stitched value shares its
            backbone prefix with the unconditional branch.
        num_inference_steps: T.
        guidance_scale: classifier-free guidance; at most 1 means none. Models with distilled guidance (FLUX) take it as
            an input instead, as their pipelines do.
        true_cfg_scale: classifier-free guidance of those models, 1 for none.
        transition: "ode", "linear_sde" or "flow_grpo", or a callable of their signature; by default "ode" for "dps" and
            "best_of_n", "flow_grpo" for the others, whose particles need noise to differ.
        height, width: image size in pixels; by default the pipeline's.
        num_frames: of video models.
        generator: B generators, one per sample, or one: the first sample then uses it as it is, the others generators
            seeded from it. Without one, seeds come from torch's global generator.
        latents: initial noise [B * K, C, h, w] in place of generated noise, K the number of particles.
        batch_size: latents that are denoised, valued or decoded together; all by default.
        max_sequence_length: rows of the text encoding. By default what the value's null text was encoded with, else the
            backbone's default.
        memory: "low" moves the text encoders to the host once they have run, reads the modulation of SD 3 from a table
            and moves its weights away, computes some activations for the gradient twice, and decodes a sample and a
            tile at a time. Where a measure does not apply it is left out; ``memory_report`` says so, and what the
            others spared. All is as before afterwards. Images differ by rounding, and where a tile is smaller than
            the image, a little at its edges. "normal" does none of it.
        output_type: "pil", "pt", "np" or "latent".
        progress: show a bar.
        options: of the method: for "dps" ``strength``, ``mode``, ``schedule``, ``window``, ``every``, ``between``.

    Raises:
        TypeError, ValueError: bad input, before any work.
        FloatingPointError: non-finite values; names the step and the tensor.
    """
    chosen, settings = get_method(method), make_options(method, options)
    step = get_transition(chosen.transition if transition is None else transition)
    backbone = backbone_of(pipe)
    if condition is None:
        prompts = as_prompts("prompt", prompt)
        negatives = as_negative_prompts(negative_prompt, len(prompts))
    else:
        _check_alone(condition, prompt, negative_prompt, guidance_scale, true_cfg_scale, max_sequence_length)
        prompts = list(condition.prompts)
    check_count("num_inference_steps", num_inference_steps)
    check_count("num_images_per_prompt", num_images_per_prompt)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_guidance_scale(guidance_scale)
    check_guidance_scale(true_cfg_scale)
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected one of {list(OUTPUT_TYPES)}, got {output_type!r}")
    if memory not in LEVELS:
        raise ValueError(f"memory: expected one of {list(LEVELS)}, got {memory!r}")
    of_sample = [p for p in range(len(prompts)) for _ in range(num_images_per_prompt)]
    particles = getattr(settings, "num_particles", 1)
    shape = _latent_shape(pipe, backbone, len(of_sample) * particles, height, width, num_frames, latents)
    check_value(value, pipe, backbone, shape)
    _check_scorers(method, value, reward)
    if value is not None:
        warn_if_few_step(pipe, backbone.denoiser)
    if is_guided(backbone.denoiser):
        raise ValueError(
            "pipe: its denoiser is guided by apply_value_guidance; call remove_value_guidance(transformer) first"
        )
    if condition is None:
        text_options = text_options_of(backbone, value, max_sequence_length)
        cfg_scale, text_options = split_guidance(backbone, guidance_scale, true_cfg_scale, text_options)
    else:
        condition = as_condition(backbone, condition, shape[1:])
    sigmas = pipeline_sigmas(pipe, backbone, num_inference_steps, shape[-2:])
    if latents is not None:
        latents = backbone.process.flow_latents(latents.to(backbone.device, torch.float32), sigmas[:1])

    report = MemoryReport(backbone.device)

    def to_images(latents: Tensor) -> Tensor:
        with tiled_decode(pipe.vae, latents, report) if memory == "low" else nullcontext():
            return backbone.decode_latents(pipe.vae, latents).clamp(0, 1)

    with progress_bar(num_inference_steps, progress) as bar:
        task = SamplingTask(
            denoiser=Denoiser(backbone, value, batch_size),
            sigmas=sigmas,
            condition=Condition(tuple(prompts[p] for p in of_sample), {}),  # encoded below, after the checks
            transition=step,
            noise=Noise(per_sample_generators(generator, len(of_sample)), backbone.device),
            shape=shape[1:],
            latents=latents,
            reward=None if reward is None else _scorer(to_images, reward, batch_size),
            on_step=bar.update,
        )
        settings.check_task(task)
        clock = Stopwatch(backbone.device)
        with (
            torch.inference_mode(False),  # a caller's inference mode would leave no way to a gradient
            frozen(backbone.denoiser),
            frozen(pipe.vae),
            _model_hooks_freed(pipe),
            backbone.fused(),
            count_evaluations(backbone) as evaluations,
            clock("total"),
        ):
            with clock("encode"):
                if condition is None:
                    condition = encode_condition(pipe, backbone, prompts, negatives, cfg_scale, text_options)
                task = replace(task, condition=condition.rows(of_sample))
            with (
                low_memory(pipe, backbone, value, sigmas, task.condition, report) if memory == "low" else nullcontext()
            ):
                with clock("sample"):
                    result = chosen.sample(task, settings)
                    if reward is not None and result.rewards.isnan().all():
                        result.rewards = task.rewards(result.latents, task.condition).cpu()[:, None]
                with clock("decode"):
                    images = result.latents
                    if output_type != "latent":
                        images = decode(to_images, result.latents, batch_size, output_type)
    return GuidedSampleOutput(
        images=images,
        latents=result.latents,
        values=result.values,
        sigmas=sigmas,
        rewards=result.rewards,
        particles=result.particles,
        log_weights=result.log_weights,
        log_evidence=result.log_evidence,
        timings=clock.seconds,
        evaluations=evaluations,
        memory_report=list(report.savings.values()),
    )


@torch.no_grad()
def decode(to_images: Callable[[Tensor], Tensor], latents: Tensor, batch_size: int | None, output_type: str):
    """Images of latents, so many at a time; of a video model a list of frames or one more dimension each."""
    from diffusers.image_processor import VaeImageProcessor

    parts = latents.split(batch_size or len(latents))
    images = torch.cat([to_images(part) for part in parts])
    if images.ndim == 5:
        images = images.transpose(1, 2)  # [B, F, 3, H, W]
    if output_type == "pt":
        return images
    arrays = images.movedim(-3, -1).float().cpu().numpy()
    if output_type == "np":
        return arrays
    to_pil = VaeImageProcessor.numpy_to_pil
    return to_pil(arrays) if images.ndim == 4 else [to_pil(frames) for frames in arrays]


@contextmanager
def _model_hooks_freed(pipe) -> Iterator[None]:
    """At the end, as at the end of a pipeline's own call: models that enable_model_cpu_offload fetched go back."""
    try:
        yield
    finally:
        pipe.maybe_free_model_hooks()


def progress_bar(total: int, show: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="guided_sample", unit="step", disable=not show)


def _scorer(to_images: Callable[[Tensor], Tensor], reward: RewardModel | RewardSum, batch_size: int | None):
    """Rewards [B] of finished latents under a condition."""

    @torch.no_grad()
    def score(latents: Tensor, condition: Condition) -> Tensor:
        size, scores = batch_size or len(latents), []
        for first in range(0, len(latents), size):
            images = to_images(latents[first : first + size])
            scores.append(score_images(reward, images, condition.prompts[first : first + size]))
        return torch.cat(scores)

    return score


# -- validation --------------------------------------------------------------------------------------------------------


def _check_alone(condition, prompt, negative_prompt, guidance_scale, true_cfg_scale, max_sequence_length) -> None:
    if not isinstance(condition, Condition):
        raise TypeError(f"condition: expected a Condition, got {type(condition).__name__}")
    given = {"prompt": prompt, "negative_prompt": negative_prompt or None, "max_sequence_length": max_sequence_length}
    for name, entry in given.items():
        if entry is not None:
            raise ValueError(f"{name}: expected none beside a condition, which is encoded already, got {entry!r}")
    defaults = inspect.signature(guided_sample).parameters
    for name, scale in (("guidance_scale", guidance_scale), ("true_cfg_scale", true_cfg_scale)):
        if scale not in (defaults[name].default, condition.guidance_scale):
            raise ValueError(f"{name}: expected the condition's own, {condition.guidance_scale:g}, got {scale!r}")


def _latent_shape(pipe, backbone: DiffusionBackbone, count: int, height, width, num_frames, latents) -> tuple[int, ...]:
    """[B, C, h, w], of a video model [B, C, T, h, w]."""
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_count(name, side)
    check_count("num_frames", num_frames)
    if num_frames > 1 and not backbone.is_video:
        raise ValueError(f"num_frames: expected 1 for a backbone of images, got {num_frames}")
    size = backbone.latent_size(pipe, height, width)
    given = isinstance(latents, Tensor) and latents.ndim == 4 + backbone.is_video
    if given:
        size = tuple(
            have if side is None else asked
            for have, asked, side in zip(latents.shape[-2:], size, (height, width), strict=True)
        )
    backbone.grid(size)
    frames = (latents.shape[2] if given else backbone.latent_frames(pipe, num_frames),) if backbone.is_video else ()
    shape = (count, backbone.latent_channels, *frames, *size)
    if latents is not None:
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            raise TypeError(
                f"latents: expected a floating-point tensor, got {getattr(latents, 'dtype', type(latents).__name__)}"
            )
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected shape {list(shape)}, got {list(latents.shape)}")
    return shape


def _check_scorers(method: str, value, reward) -> None:
    if reward is not None and not isinstance(reward, RewardModel | RewardSum):
        raise TypeError(f"reward: expected a RewardModel, a RewardSum or None, got {type(reward).__name__}")
    if value is None and method != "dps" and (method != "best_of_n" or reward is None):
        wanted = "an estimator, or a reward," if method == "best_of_n" else "an estimator"
        raise ValueError(f"value: expected {wanted} for method {method!r}, got None")
