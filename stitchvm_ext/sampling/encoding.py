"""From prompts to what the denoiser reads."""

from __future__ import annotations

from collections.abc import Callable

from ..backbones import Condition, DiffusionBackbone, Encoding, stack_rows
from .checks import as_prompts


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
