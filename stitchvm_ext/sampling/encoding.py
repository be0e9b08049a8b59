"""From prompts, or encodings of them, to what the denoiser reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..backbones import Condition, DiffusionBackbone, Encoding, backbone_of, stack_rows
from ..value.base import ValueEstimator
from .checks import as_prompts, check_guidance_scale


def encode_prompts(
    pipe,
    prompt: str | list[str],
    negative_prompt: str | list[str] = "",
    *,
    value: ValueEstimator | None = None,
    guidance_scale: float = 7.0,
    true_cfg_scale: float = 1.0,
    max_sequence_length: int | None = None,
) -> Condition:
    """Encode prompts ahead, for ``guided_sample(pipe, value, condition=...)``, which then asks no text encoder: the
    pipeline's may be gone (``pipe.text_encoder = None``).

    Args:
        pipe: a diffusers pipeline with its text encoders.
        prompt: one text or a list.
        negative_prompt: one text for all or one per prompt.
        value: the estimator that will be used: the texts then are as long as its null text, which it can share.
        guidance_scale, true_cfg_scale, max_sequence_length: as for :func:`guided_sample`. They are the condition's own.

    Returns:
        A condition of one row per prompt, on the pipeline's device.

    Raises:
        TypeError, ValueError: bad input, before any work.
    """
    backbone, prompts = backbone_of(pipe), as_prompts("prompt", prompt)
    negatives = as_negative_prompts(negative_prompt, len(prompts))
    check_guidance_scale(guidance_scale)
    check_guidance_scale(true_cfg_scale)
    options = text_options_of(backbone, value, max_sequence_length)
    scale, options = split_guidance(backbone, guidance_scale, true_cfg_scale, options)
    return encode_condition(pipe, backbone, prompts, negatives, scale, options)


def as_condition(backbone: DiffusionBackbone, condition: Condition, latent_size: tuple[int, ...]) -> Condition:
    """A caller's condition as the backbone's: on its device, with its rule for the guided velocity.

    Args:
        latent_size: of one latent, [C, H, W] (video: [C, T, H, W]).
    """
    if not len(condition):
        raise ValueError("condition: expected at least one row, got none")
    latents = torch.zeros(1, *latent_size, device=backbone.device)
    condition = replace(condition.to(backbone.device), rescale=condition.rescale or backbone.rescale_guidance)
    first = condition.rows([0])
    for name, encoding in (("cond", first.cond), ("uncond", first.uncond)):
        try:
            if encoding is not None:
                backbone.call_inputs(latents, latents.new_ones(1), encoding)
        except KeyError as missing:
            reader, got = type(backbone).__name__, sorted(encoding)
            raise ValueError(f"condition: expected {missing} in {name}, which {reader} reads, got {got}") from None
    return condition


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


def as_negative_prompts(negative_prompt, count: int) -> list[str]:
    """One negative prompt for each of ``count`` prompts, from one for all or a list of so many."""
    if isinstance(negative_prompt, str):
        return [negative_prompt] * count
    negatives = as_prompts("negative_prompt", negative_prompt)
    if len(negatives) != count:
        raise ValueError(f"negative_prompt: expected one text or {count}, one per prompt, got {len(negatives)}")
    return negatives


def text_options_of(backbone: DiffusionBackbone, value, max_sequence_length: int | None) -> dict:
    """Options of the text encoding: by default those of the value's null text, so that the two can be shared."""
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
