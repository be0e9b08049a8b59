"""A guidance strength that suits a value, found on a few latents instead of by a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backbones import backbone_of
from ..rewards.base import RewardModel
from ..rewards.sum import RewardSum
from ..value.base import ValueEstimator
from .checks import as_prompts, check_count
from .encoding import encode_condition, split_guidance, text_options_of
from .guidance import Guidance
from .guided_sample import guided_sample
from .noise import per_sample_generators

STRENGTHS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
CHECKED_AT = 0.3  # noise level at which a finished latent is asked again


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found.

    Attributes:
        guidance: the settings with the strength that scored best; its fields are options of :func:`guided_sample`.
        strengths: those that were tried, 0 first.
        scores: mean score of the samples at each of them.
        standard_errors: of the mean differences to strength 0; that of strength 0 is 0.
    """

    guidance: Guidance
    strengths: tuple[float, ...]
    scores: tuple[float, ...]
    standard_errors: tuple[float, ...]

    def table(self) -> str:
        """One line per strength, the chosen one marked."""
        lines = ["strength     score   against 0"]
        for strength, score, error in zip(self.strengths, self.scores, self.standard_errors, strict=True):
            mark = "  <- chosen" if strength == self.guidance.strength else ""
            lines.append(f"{strength:8g} {score:9.4f}   {score - self.scores[0]:+.4f} ± {error:.4f}{mark}")
        return "\n".join(lines)


def calibrate(
    pipe,
    value: ValueEstimator,
    prompt: str | list[str],
    *,
    reward: RewardModel | RewardSum | None = None,
    guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
    strengths: Sequence[float] = STRENGTHS,
    num_inference_steps: int = 10,
    num_images_per_prompt: int = 2,
    generator: torch.Generator | list[torch.Generator] | None = None,
    progress: bool = True,
    **options: Any,
) -> Calibration:
    """Choose the strength of value-gradient guidance by short runs from the same noise at several strengths.

    Samples are scored by ``reward``, which sees what a gradient that only fools the value does to the images. Without
    one they are noised again, to noise level 0.3 with noise of their own, and the value is asked there: what fooled it
    along the way is mostly gone with the noise that it was made for, but it remains the judge of its own gradient, so
    give the reward where there is one.

    Args:
        pipe, value, prompt: as for :func:`guided_sample`; a handful of prompts like those to be sampled.
        reward: scores finished images.
        guidance: mode, schedule, window and so on; its strength is what is sought.
        strengths: tried beside 0.
        num_inference_steps: of the runs. Relative strengths transfer to other numbers of steps.
        num_images_per_prompt: seeds per prompt.
        generator: as for :func:`guided_sample`.
        options: further ones of :func:`guided_sample`, such as ``guidance_scale`` and ``transition``.

    Raises:
        ValueError: no strength, or one that is not above 0.
    """
    prompts = [p for p in as_prompts("prompt", prompt) for _ in range(num_images_per_prompt)]
    check_count("num_images_per_prompt", num_images_per_prompt)
    tried = sorted(set(float(s) for s in strengths))
    if not tried or tried[0] <= 0:
        raise ValueError(f"strengths: expected numbers above 0, got {list(strengths)}")
    for name in ("method", "output_type", *vars(guidance)):
        if name in options:
            raise TypeError(f"{name}: expected it in guidance, or not at all; calibrate runs method 'dps'")
    sources = per_sample_generators(generator, len(prompts))
    states = [g.get_state() for g in sources]
    judge = _value_of_noised(pipe, value, prompts, options) if reward is None else None

    scores = []
    for strength in (0.0, *tried):
        for source, state in zip(sources, states, strict=True):
            source.set_state(state)  # every strength starts from the same noise
        settings = vars(replace(guidance, strength=strength))
        result = guided_sample(
            pipe, value, prompts, reward=reward, num_inference_steps=num_inference_steps, generator=sources,
            output_type="latent", progress=progress, **settings, **options,
        )  # fmt: skip
        scores.append((result.rewards[:, 0] if judge is None else judge(result.latents)).cpu())
    table = torch.stack(scores).double()  # [strengths, B]
    errors = (table - table[0]).std(1) / len(prompts) ** 0.5 if len(prompts) > 1 else torch.zeros(len(table))
    best = int(table.mean(1).argmax())
    tried = [0.0, *tried]
    return Calibration(
        replace(guidance, strength=tried[best]),
        tuple(tried),
        tuple(table.mean(1).tolist()),
        tuple(errors.tolist()),
    )


def _value_of_noised(pipe, value: ValueEstimator, prompts: list[str], options: dict[str, Any]):
    """The value [B] of finished latents, noised to ``CHECKED_AT`` with the same noise each time."""
    backbone = backbone_of(pipe)
    text = text_options_of(backbone, value, options.get("max_sequence_length"))
    scale, text = split_guidance(backbone, options.get("guidance_scale", 7.0), options.get("true_cfg_scale", 1.0), text)
    condition = encode_condition(pipe, backbone, prompts, [""] * len(prompts), scale, text)

    @torch.no_grad()
    def ask(latents: Tensor) -> Tensor:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
        return value.value((1 - CHECKED_AT) * latents + CHECKED_AT * noise, CHECKED_AT, condition)

    return ask
