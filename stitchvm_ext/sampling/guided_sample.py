"""``guided_sample``: from prompts to images under the gradient of a value estimator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backbones import Condition, DiffusionBackbone, Encoding, backbone_of, stack_rows
from ..backbones.base import frozen
from ..backbones.distilled import warn_if_few_step
from ..backbones.identity import check_latent_space, latent_space
from ..fused.step_graph import StepGraph
from ..value import StitchedValue
from ..value.base import ValueEstimator
from .checks import as_prompts, check_count, check_guidance_scale
from .dps import sample_dps
from .guidance import Guidance
from .hook import is_guided
from .noise import NoiseSource, draw_all, per_sample_generators
from .schedule import pipeline_sigmas
from .transitions import Transition, get_transition, ode

OUTPUT_TYPES = ("pil", "pt", "np", "latent")


@dataclass
class GuidedSampleOutput:
    """What :func:`guided_sample` returns for B samples in T steps.

    Attributes:
        images: B PIL images; for "pt" a tensor [B, 3, H, W] and for "np" an array [B, H, W, 3], both in [0, 1]; for
            "latent" the latents. Of video models B lists of F images, [B, F, 3, H, W] and [B, F, H, W, 3].
        latents: final latents, float32 [B, C, h, w] (video: [B, C, T, h, w]), in flow coordinates.
        values: V(z_t, t) before each step, float32 [T, B] on the CPU; NaN at steps that were not guided.
        sigmas: noise levels, float32 [T+1]; ``values[k]`` was taken at ``sigmas[k]``.
        timings: wall-clock seconds by phase ("encode", "sample", "decode") and in all ("total").
        denoiser_evaluations: forward passes of the whole denoiser for one sample each, counted at its blocks: half
            of its blocks run for one sample count 0.5. Backward passes are not counted.
        guided_steps: steps at which the value was evaluated.
    """

    images: Any
    latents: Tensor
    values: Tensor
    sigmas: Tensor
    timings: dict[str, float] = field(default_factory=dict)
    denoiser_evaluations: float = 0.0
    guided_steps: int = 0

    @property
    def seconds_per_image(self) -> float:
        return self.timings["total"] / len(self.latents)


def guided_sample(
    pipe,
    value: ValueEstimator | None,
    prompt: str | list[str],
    *,
    negative_prompt: str | list[str] = "",
    num_inference_steps: int = 28,
    guidance_scale: float = 7.0,
    true_cfg_scale: float = 1.0,
    strength: float = Guidance.strength,
    mode: str = Guidance.mode,
    schedule: str | Callable[[float], float] = Guidance.schedule,
    window: tuple[int, int | None] = Guidance.window,
    every: int = Guidance.every,
    transition: str | Transition = "ode",
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    num_frames: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: Tensor | None = None,
    batch_size: int | None = None,
    max_sequence_length: int | None = None,
    output_type: str = "pil",
    progress: bool = True,
) -> GuidedSampleOutput:
    """Sample a pipeline's images under value-gradient guidance (DPS, METHOD.md §5).

    The pipeline's own text encoders, noise levels, classifier-free guidance and autoencoder are used; with
    ``value=None`` or ``strength=0``, and ``transition="ode"``, the result is the pipeline's own with a first-order
    solver (Euler on flows, DDIM on DDPM models, down to noise level 0), to float rounding. A sample does not depend on
    the samples beside it: texts are encoded one by one, norms are per sample, and every sample has its own generator.

    Args:
        pipe: a diffusers pipeline whose transformer or U-Net has a backbone adapter.
        value: any estimator on this pipeline's denoiser; None samples without guidance. A stitched value may also be
            one on another backbone with the same latent space (SD 3.5 Medium's for Large), which runs beside it.
        prompt: P texts; B = P * num_images_per_prompt samples, those of one prompt next to each other.
        negative_prompt: one text for all or one per prompt. With "" (the null text) a stitched value shares its
            backbone prefix with the unconditional branch.
        num_inference_steps: T.
        guidance_scale: classifier-free guidance; at most 1 means none. Models with distilled guidance (FLUX) take it as
            an input instead, as their pipelines do.
        true_cfg_scale: classifier-free guidance of those models, 1 for none.
        strength, mode, schedule, window, every: see :class:`~stitchvm_ext.sampling.Guidance`.
        transition: "ode", "linear_sde" or "flow_grpo", or a callable of their signature.
        height, width: image size in pixels; by default the pipeline's.
        num_frames: of video models.
        generator: B generators, one per sample, or one: the first sample then uses it as it is, the others generators
            seeded from it. Without one, seeds come from torch's global generator.
        latents: initial noise [B, C, h, w] in place of generated noise.
        batch_size: samples that are denoised, and decoded, together; all by default.
        max_sequence_length: rows of the text encoding. By default what the value's null text was encoded with, else the
            backbone's default.
        output_type: "pil", "pt", "np" or "latent".
        progress: show a bar.

    Raises:
        TypeError, ValueError: bad input, before any work.
        FloatingPointError: non-finite values; names the step and the tensor.
    """
    guidance = Guidance(strength, mode, schedule, tuple(window) if isinstance(window, list) else window, every)
    step = get_transition(transition)
    backbone = backbone_of(pipe)
    prompts = as_prompts("prompt", prompt)
    negatives = _negative_prompts(negative_prompt, len(prompts))
    check_count("num_inference_steps", num_inference_steps)
    check_count("num_images_per_prompt", num_images_per_prompt)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_guidance_scale(guidance_scale)
    check_guidance_scale(true_cfg_scale)
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected one of {list(OUTPUT_TYPES)}, got {output_type!r}")
    prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
    negatives = [p for p in negatives for _ in range(num_images_per_prompt)]
    shape = _latent_shape(pipe, backbone, len(prompts), height, width, num_frames, latents)
    check_value(value, pipe, backbone, shape)
    if value is not None:
        warn_if_few_step(pipe, backbone.denoiser)
    if is_guided(backbone.denoiser):
        raise ValueError(
            "pipe: its denoiser is guided by apply_value_guidance; call remove_value_guidance(transformer) first"
        )
    text_options = resolve_text_options(backbone, value, max_sequence_length)
    cfg_scale, text_options = split_guidance(backbone, guidance_scale, true_cfg_scale, text_options)
    batch_size = batch_size or len(prompts)
    chunks = [slice(first, first + batch_size) for first in range(0, len(prompts), batch_size)]
    sources = [NoiseSource(g, backbone.device) for g in per_sample_generators(generator, len(prompts))]
    sigmas = pipeline_sigmas(pipe, backbone, num_inference_steps, shape[-2:])

    clock = Stopwatch(backbone.device)
    with (
        torch.inference_mode(False),  # a caller's inference mode would leave no way to a gradient
        frozen(backbone.denoiser),
        frozen(pipe.vae),
        backbone.fused(),
        count_block_rows(backbone) as rows,
        clock("total"),
    ):
        with clock("encode"):
            condition = encode_condition(pipe, backbone, prompts, negatives, cfg_scale, text_options)
        with clock("sample"):
            if latents is None:
                latents = draw_all(sources, shape[1:], torch.float32 if backbone.float32_noise else backbone.dtype)
            latents = backbone.process.flow_latents(latents.to(backbone.device, torch.float32), sigmas[:1])
            with progress_bar(len(chunks) * num_inference_steps, progress) as bar:
                done = [
                    sample_dps(
                        backbone,
                        value,
                        latents[chunk],
                        sigmas,
                        condition.rows(chunk),
                        guidance=guidance,
                        transition=step,
                        noise=None if step is ode else partial(draw_all, sources[chunk], shape[1:]),
                        on_step=bar.update,
                    )
                    for chunk in chunks
                ]
            latents = torch.cat([z for z, _ in done])
            values = torch.cat([v for _, v in done], dim=1).cpu()
        with clock("decode"):
            images = latents if output_type == "latent" else decode(pipe, backbone, latents, chunks, output_type)
    return GuidedSampleOutput(
        images=images,
        latents=latents,
        values=values,
        sigmas=sigmas,
        timings=clock.seconds,
        denoiser_evaluations=rows.count / len(backbone.blocks),
        guided_steps=int((~values.isnan()).any(1).sum()),
    )


# -- the phases --------------------------------------------------------------------------------------------------------


def split_guidance(
    backbone: DiffusionBackbone, guidance_scale: float, true_cfg_scale: float, text_options: dict
) -> tuple[float, dict]:
    """The scale of classifier-free guidance, and the text options, in which models with distilled guidance have
    ``guidance_scale``.
    """
    if not backbone.distilled_guidance:
        return float(guidance_scale), text_options
    return float(true_cfg_scale), {**text_options, "guidance": float(guidance_scale)}


def encode_condition(
    pipe, backbone: DiffusionBackbone, prompts: list[str], negatives: list[str], guidance_scale: float, options: dict
) -> Condition:
    """Encodings of prompts and, for guidance_scale > 1, negative prompts, a row each.

    Each distinct text is encoded once and alone: in a batch its encoding would depend, in the last bits, on the other
        texts.
    """

    def rows(texts: list[str], encode: Callable[..., Encoding]) -> Encoding:
        encoded = {text: encode(pipe, [text], **options) for text in dict.fromkeys(texts)}
        return stack_rows([encoded[text] for text in texts])

    uncond = rows(negatives, backbone.encode_negative) if guidance_scale > 1 else None
    cond = rows(prompts, backbone.encode_text)
    return Condition(tuple(prompts), cond, uncond, guidance_scale, backbone.rescale_guidance)


@torch.no_grad()
def decode(pipe, backbone: DiffusionBackbone, latents: Tensor, chunks: list[slice], output_type: str):
    """Images of latents by the pipeline's autoencoder; of a video model a list of frames or one more dimension each."""
    from diffusers.image_processor import VaeImageProcessor

    images = torch.cat([backbone.decode_latents(pipe.vae, latents[chunk]) for chunk in chunks]).clamp(0, 1)
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
def progress_bar(total: int, show: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="guided_sample", unit="step", disable=not show) as bar:
        yield bar


class Stopwatch:
    """Adds up wall-clock seconds by phase; waits for the device at both ends of a phase."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, phase: str):
        start = self._now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - start


class _Rows:
    count = 0


@contextmanager
def count_block_rows(backbone: DiffusionBackbone) -> Iterator[_Rows]:
    """Count the samples that pass through each of the denoiser's blocks, whoever calls them."""
    rows = _Rows()

    def add(module, args, kwargs):
        rows.count += len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def add_replay(batch: int):  # hooks do not run inside a CUDA graph
        rows.count += batch * len(backbone.blocks)

    handles = [block.register_forward_pre_hook(add, with_kwargs=True) for block in backbone.blocks]
    graph = backbone.denoiser.__dict__.get("forward")
    if isinstance(graph, StepGraph):
        graph.on_replay = add_replay
    try:
        yield rows
    finally:
        if isinstance(graph, StepGraph):
            graph.on_replay = None
        for handle in handles:
            handle.remove()


# -- validation --------------------------------------------------------------------------------------------------------


def _negative_prompts(negative_prompt, count: int) -> list[str]:
    if isinstance(negative_prompt, str):
        return [negative_prompt] * count
    negatives = as_prompts("negative_prompt", negative_prompt)
    if len(negatives) != count:
        raise ValueError(f"negative_prompt: expected one text or {count}, one per prompt, got {len(negatives)}")
    return negatives


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


def check_value(value, pipe, backbone: DiffusionBackbone, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless this is None or an estimator that reads latents of this shape."""
    if value is None:
        return
    if not isinstance(value, ValueEstimator):
        raise TypeError(f"value: expected a ValueEstimator or None, got {type(value).__name__}")
    if value.backbone.denoiser is not backbone.denoiser:
        if not isinstance(value, StitchedValue):
            raise ValueError(
                "value: expected a StitchedValue, or an estimator on this pipeline's own denoiser, got "
                f"{type(value).__name__} on another {type(value.backbone.denoiser).__name__}"
            )
        if value.prompt_conditioned:
            raise ValueError("value: a prompt-conditioned value reads the text encoding of its own pipeline only")
        check_latent_space(value.latent_space, latent_space(backbone, pipe))
    if hasattr(value, "check_latent_size"):
        value.check_latent_size(shape[-2:])


def resolve_text_options(backbone: DiffusionBackbone, value, max_sequence_length) -> dict:
    """Options of the text encoding: those of the value's null text, where it is on this backbone, unless a length is
    given. Raises ValueError or TypeError for a length that the backbone does not take.
    """
    if max_sequence_length is None:
        own = value is not None and value.backbone.denoiser is backbone.denoiser
        return dict(getattr(value, "text_options", {}) if own else {})
    if isinstance(max_sequence_length, bool) or not isinstance(max_sequence_length, int):
        raise TypeError(f"max_sequence_length: expected an integer, got {type(max_sequence_length).__name__}")
    if "max_sequence_length" not in backbone.text_options:
        raise ValueError(f"max_sequence_length: expected None, the text length of {type(backbone).__name__} is fixed")
    if not 0 <= max_sequence_length <= 512:
        raise ValueError(f"max_sequence_length: expected 0..512, got {max_sequence_length}")
    return {"max_sequence_length": max_sequence_length}
