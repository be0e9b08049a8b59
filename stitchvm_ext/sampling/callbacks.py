"""Value guidance and FK steering at the ends of steps of unchanged pipelines. Importing this module imports diffusers.

``callback_on_step_end`` sees the latents after ``scheduler.step`` and may replace them; it sees no velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from ..backbones import DDPM, Condition, DiffusionBackbone, backbone_of
from ..backbones.base import frozen
from ..backbones.distilled import warn_if_few_step
from ..rewards.base import RewardModel
from ..rewards.sum import RewardSum
from ..value import ValueEstimator
from ..value.base import score_images
from .checks import Window, as_prompts, check_count, check_value, steps_of
from .encoding import as_negative_prompts, encode_condition, split_guidance, text_options_of
from .fk import FK
from .guidance import Guidance, check_finite
from .hook import is_guided
from .noise import Noise, per_sample_generators
from .particles import ParticleWeights
from .schedule import check_flow_scheduler


class _ValueCallback(PipelineCallback):
    """What both callbacks know at the end of a step: latents as the value reads them, noise levels and condition."""

    tensor_inputs = ["latents"]

    def __init__(self, value: ValueEstimator, prompts, negative_prompt, height: int | None, width: int | None):
        super().__init__()
        if not isinstance(value, ValueEstimator):
            raise TypeError(f"value: expected a ValueEstimator, got {type(value).__name__}")
        for name, side in (("height", height), ("width", width)):
            if side is not None:
                check_count(name, side)
        self.value, self.prompts = value, as_prompts("prompts", prompts)
        self.negatives = as_negative_prompts(negative_prompt, len(self.prompts))
        self.height, self.width = height, width
        self.backbone: DiffusionBackbone | None = None  # the pipeline's; these three from its first step on
        self.condition: Condition | None = None
        self.sigmas: Tensor | None = None  # [T+1] of the steps that the pipeline takes, float32 on the CPU

    def callback_fn(self, pipeline, step_index: int, timestep, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        packed = callback_kwargs["latents"]
        if step_index == 0:
            self._read_pipeline(pipeline, packed)
            self._begin(pipeline)
        elif self.sigmas is None:
            raise ValueError("pipeline: expected its first step before its others, got them without it")
        latents = self._unpack(packed)
        with frozen(self.backbone.denoiser):
            changed = self._after(pipeline, step_index, latents)
        if changed is not latents:
            callback_kwargs["latents"] = self._pack(changed).to(packed.dtype)
        return callback_kwargs

    def _begin(self, pipeline) -> None:
        """Called at the end of a trajectory's first step."""
        raise NotImplementedError

    def _after(self, pipeline, step: int, latents: Tensor) -> Tensor:
        """Called with the latents at ``sigmas[step + 1]``; returns them, or others in their place."""
        raise NotImplementedError

    def _read_pipeline(self, pipeline, packed: Tensor) -> None:
        backbone, scheduler = backbone_of(pipeline), pipeline.scheduler
        if isinstance(backbone.process, DDPM):
            raise TypeError(f"pipeline: expected a flow-matching one, got {type(pipeline).__name__}; use guided_sample")
        check_flow_scheduler(scheduler)
        if scheduler.order != 1:
            raise ValueError(f"pipeline.scheduler: expected one of first order, got order {scheduler.order}")
        if is_guided(backbone.denoiser):
            raise ValueError(
                "pipeline: its denoiser is guided by apply_value_guidance; call remove_value_guidance first"
            )
        self.backbone = backbone
        self._latent_size = self._size_of(pipeline, packed)
        latents = self._unpack(packed)
        check_value(self.value, pipeline, backbone, latents.shape)
        warn_if_few_step(pipeline, backbone.denoiser)
        if len(latents) % len(self.prompts):
            raise ValueError(f"prompts: expected {len(self.prompts)} samples or a multiple of it, got {len(latents)}")
        # img2img starts late: the step that just ended was its first.
        self.sigmas = scheduler.sigmas[scheduler.step_index - 1 :].float().cpu()
        self.condition = self._encode(pipeline, len(latents) // len(self.prompts))

    def _size_of(self, pipeline, packed: Tensor) -> tuple[int, int]:
        if packed.ndim == 4 + self.backbone.is_video:
            return tuple(packed.shape[-2:])
        asked = self.height is not None or self.width is not None
        own = None if asked else getattr(self.value, "latent_size", None)
        size = own or self.backbone.latent_size(pipeline, self.height, self.width)
        like = torch.empty(len(packed), self.backbone.latent_channels, *size, device="meta")
        if self.backbone.pack(like).shape != packed.shape:
            raise ValueError(
                f"height, width: expected those that the pipeline is called with, got latents of {tuple(size)} where "
                f"the pipeline has tokens {list(packed.shape)}"
            )
        return tuple(size)

    def _encode(self, pipeline, repeats: int) -> Condition:
        texts, negatives = ([t for t in ts for _ in range(repeats)] for ts in (self.prompts, self.negatives))
        if not self.value.reads_encoding:
            return Condition(tuple(texts), {})
        options = text_options_of(self.backbone, self.value, None)
        scale, options = split_guidance(self.backbone, pipeline.guidance_scale, 1.0, options)
        return encode_condition(pipeline, self.backbone, texts, negatives, scale, options)

    def _unpack(self, packed: Tensor) -> Tensor:
        return self.backbone.unpack(packed, torch.empty(0, 1, *self._latent_size, device="meta")).float()

    def _pack(self, latents: Tensor) -> Tensor:
        return self.backbone.pack(latents)


class ValueGuidanceCallback(_ValueCallback):
    """Value guidance that needs nothing but a pipeline's ``callback_on_step_end``::

        pipe(prompt, callback_on_step_end=ValueGuidanceCallback(value, [prompt], strength=0.2))

    After step k the latents are z at ``sigmas[k+1]``. The callback moves them by what the guidance there takes off the
    velocity, ``c grad V(z, sigmas[k+1])``, times the length of step k+1. That is the guided step k+1, but for its
    velocity, which the pipeline evaluates at the moved latents: the gradient lags one step behind what
    :func:`apply_value_guidance` does, and the difference shrinks with the length of the steps. Step 0 cannot be guided.
    Nor can step 1 in relative mode: the velocity of step k is read off the latents before and after it, and those
    before step 0 are not shown. Prefer the hook where the pipeline allows it: it is exact, and shares the prefix.

    A scheduler with ``stochastic_sampling`` hides its velocities, so it needs the mode "score" or "raw".

    Args:
        value: an estimator on the pipeline's denoiser, or a stitched one of the same latent space.
        prompts: the texts that the pipeline is called with, which the reward scores against.
            ``num_images_per_prompt`` is read off the batch.
        strength, mode, schedule, window, every: see :class:`~stitchvm_ext.sampling.Guidance`; steps are the pipeline's,
            which img2img counts from where it starts.
        negative_prompt: read by values that read encodings of texts (Tweedie): one text, or one per prompt.
        height, width: what the pipeline is called with, where it packs its latents (FLUX); by default what the value
            was made for, or else the pipeline's own.

    Attributes:
        values: (sigma, V float32 [B]) of the guided steps of the latest trajectory.

    Raises:
        TypeError, ValueError: bad input. A pipeline that does not fit raises at the end of its first step.
        FloatingPointError: a value or gradient is not finite; names the step.
    """

    def __init__(
        self,
        value: ValueEstimator,
        prompts: str | list[str],
        *,
        strength: float = Guidance.strength,
        mode: str = Guidance.mode,
        schedule: str | Callable[[float], float] = Guidance.schedule,
        window: tuple[int, int | None] = Guidance.window,
        every: int = Guidance.every,
        negative_prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
    ):
        super().__init__(value, prompts, negative_prompt, height, width)
        self.guidance = Guidance(strength, mode, schedule, window, every)
        self.values: list[tuple[float, Tensor]] = []
        self._left: Tensor | None = None  # the latents that the pipeline went on with

    def _begin(self, pipeline) -> None:
        self.values, self._left = [], None
        scheduler, relative = pipeline.scheduler, self.guidance.mode == "relative"
        if is_stochastic(scheduler) and (relative or not isinstance(scheduler, FlowMatchEulerDiscreteScheduler)):
            raise ValueError(
                "pipeline.scheduler: expected a deterministic one, or FlowMatchEulerDiscreteScheduler with "
                f'stochastic_sampling and mode "score" or "raw", got {type(scheduler).__name__} and mode '
                f"{self.guidance.mode!r}"
            )
        first = 2 if relative else 1
        steps = list(enumerate(self.sigmas[:-1].tolist()))[first:]
        if self.guidance.strength > 0 and not any(self.guidance.is_active(step, sigma) for step, sigma in steps):
            raise ValueError(
                f"window, schedule: expected at least one guided step from step {first} on, the first that a callback "
                f"can guide, got none out of {len(self.sigmas) - 1} with window {self.guidance.window} and schedule "
                f"{self.guidance.schedule!r}"
            )

    def _after(self, pipeline, step: int, latents: Tensor) -> Tensor:
        before, sigma, *following = self.sigmas[step : step + 3].tolist()
        velocity = None if self._left is None else (latents - self._left) / (sigma - before)
        if following and self.guidance.is_active(step + 1, sigma) and self._knows_length(velocity):
            value, grad = self.value.value_and_grad(latents, sigma, self.condition)
            check_finite(step + 1, sigma, value=value, gradient=grad)
            self.values.append((sigma, value))
            # The other modes do not look at the velocity.
            term = self.guidance.term(latents if velocity is None else velocity, grad, sigma)
            # How far a step carries its velocity: all the way to the clean end where it draws new noise from there.
            length = sigma if is_stochastic(pipeline.scheduler) else sigma - following[0]
            latents = latents + length * term
        self._left = latents
        return latents

    def _knows_length(self, velocity: Tensor | None) -> bool:
        return velocity is not None or self.guidance.mode != "relative"


class FKSteeringCallback(_ValueCallback):
    """FK steering (METHOD.md §5) of an unchanged pipeline, whose images of one prompt are the particles::

        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=True)
        steering = FKSteeringCallback(value, [prompt], num_particles=4)
        images = pipe(prompt, num_images_per_prompt=4, callback_on_step_end=steering).images
        image = images[steering.best[0]]

    Events weigh and resample the particles as ``guided_sample(method="fk")`` does, without proposals. Last, the
    finished particles are weighed by their reward and left as they are.

    The scheduler has to be stochastic: under a deterministic one the copies of a particle would stay equal to the end.
    Steering tilts the law of the samples that this scheduler draws. ``stochastic_sampling`` makes all noise anew from
    the denoised estimate at every step, which is not the model's own law; ``guided_sample`` has transitions that keep
    it. diffusers' pipelines draw the noise of their steps from torch's global generator: seed that for equal results.
    Its img2img pipelines hand several images out in turn, not prompt by prompt: steer one image at a time.

    Args:
        value, prompts, negative_prompt, height, width: as for :class:`ValueGuidanceCallback`.
        reward: scores the finished images, decoded by the pipeline's autoencoder; without one the value is asked at
            noise level 0.
        num_particles: K, what the pipeline is called with as ``num_images_per_prompt``.
        potential, scale, target_ess, resample_window, resample_every, ess_threshold, resampling: see
            :class:`~stitchvm_ext.sampling.FK`.
        generator: for the resampling: one per prompt, or one that the others are seeded from.

    Attributes:
        best: int64 [P], for every prompt the position of its best particle among the pipeline's images.
        rewards: float32 [P, K] of the finished particles.
        log_weights: float64 [P, K] of the finished particles.
        log_evidence: float64 [P], see :class:`~stitchvm_ext.sampling.particles.ParticleWeights`.
        values: (sigma, V float32 [P, K]) at the events of the latest trajectory, before resampling.
        ancestors: int64 [P, K] at each of these.

    Raises:
        TypeError, ValueError: bad input. A pipeline that does not fit raises at the end of its first step.
        FloatingPointError: a value is NaN or +inf, or every particle of a prompt has weight 0.
    """

    def __init__(
        self,
        value: ValueEstimator,
        prompts: str | list[str],
        *,
        reward: RewardModel | RewardSum | None = None,
        num_particles: int = FK.num_particles,
        potential: str = FK.potential,
        scale: float | None = FK.scale,
        target_ess: float = FK.target_ess,
        resample_window: Window = FK.resample_window,
        resample_every: int = FK.resample_every,
        ess_threshold: float = FK.ess_threshold,
        resampling: str = FK.resampling,
        generator: torch.Generator | list[torch.Generator] | None = None,
        negative_prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
    ):
        super().__init__(value, prompts, negative_prompt, height, width)
        if reward is not None and not isinstance(reward, RewardModel | RewardSum):
            raise TypeError(f"reward: expected a RewardModel, a RewardSum or None, got {type(reward).__name__}")
        self.reward = reward
        self.options = FK(
            num_particles=num_particles,
            potential=potential,
            scale=scale,
            target_ess=target_ess,
            resample_window=resample_window,
            resample_every=resample_every,
            ess_threshold=ess_threshold,
            resampling=resampling,
        )
        self._noise = Noise(per_sample_generators(generator, len(self.prompts)), torch.device("cpu"))
        self._forget()

    def _forget(self) -> None:
        self.best = self.rewards = self.log_weights = self.log_evidence = None
        self.values: list[tuple[float, Tensor]] = []
        self.ancestors: list[Tensor] = []

    def _begin(self, pipeline) -> None:
        self._forget()
        count, options = self.options.num_particles, self.options
        if len(self.condition) != len(self.prompts) * count:
            raise ValueError(
                f"num_particles: expected the pipeline's num_images_per_prompt, got {count} where "
                f"{len(self.prompts)} prompts have {len(self.condition)} images"
            )
        if count > 1 and not is_stochastic(pipeline.scheduler):
            name = type(pipeline.scheduler).__name__
            raise ValueError(
                f"pipeline.scheduler: expected a stochastic one, got {name}, under which the copies of a particle stay "
                "equal; set pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, "
                "stochastic_sampling=True)"
            )
        steps = steps_of("resample_window", options.resample_window, len(self.sigmas) - 1)
        self._events = steps[:: options.resample_every]
        target_ess = options.target_ess if options.scale is None else None
        self._weights = ParticleWeights(len(self.prompts), count, options.potential, options.scale or 0.0, target_ess)

    def _after(self, pipeline, step: int, latents: Tensor) -> Tensor:
        sigma, is_last = float(self.sigmas[step + 1]), step == len(self.sigmas) - 2
        if is_last:
            self._finish(pipeline, latents, sigma)
        elif step in self._events and self.options.num_particles > 1:
            latents = self._resample(latents, sigma)
        return latents

    def _resample(self, latents: Tensor, sigma: float) -> Tensor:
        count = self.options.num_particles
        values = self._values(latents, sigma).view(-1, count)
        self._weights.update(values)
        ancestors = self._weights.resample(
            self._noise.uniform(count), self.options.resampling, self.options.ess_threshold
        )
        self.values.append((sigma, values))
        self.ancestors.append(ancestors)
        rows = ancestors + count * torch.arange(len(ancestors))[:, None]
        return latents.index_select(0, rows.flatten().to(latents.device))

    def _finish(self, pipeline, latents: Tensor, sigma: float) -> None:
        count = self.options.num_particles
        if self.reward is None:
            rewards = self._values(latents, sigma)
        else:
            with torch.no_grad():
                images = self.backbone.decode_latents(pipeline.vae, latents).clamp(0, 1)
                rewards = score_images(self.reward, images, self.condition.prompts)
        self.rewards = rewards.float().view(-1, count).cpu()
        self._weights.update(self.rewards, final=True)
        self.log_weights, self.log_evidence = self._weights.log_weights, self._weights.log_evidence
        self.best = self.rewards.argmax(1) + count * torch.arange(len(self.prompts))

    @torch.no_grad()
    def _values(self, latents: Tensor, sigma: float) -> Tensor:
        return self.value.value(latents, sigma, self.condition).float()


def is_stochastic(scheduler) -> bool:
    """Whether a flow scheduler's steps draw noise."""
    algorithm = scheduler.config.get("algorithm_type") or ""
    return bool(scheduler.config.get("stochastic_sampling")) or algorithm.startswith("sde-")
