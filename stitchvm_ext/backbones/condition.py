"""What one denoising step is conditioned on: the prompts, and their encodings for the two branches of guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Encoding = dict[str, Tensor]
"""Keyword tensors of the transformer's text side, each with a leading batch dimension."""


@dataclass(frozen=True)
class Condition:
    """Prompts and their encodings, one row per sample.

    An encoding holds what the backbone's :meth:`~DiffusionBackbone.encode_text` returns, under the same names. These
    are the tensors that the pipeline's ``encode_prompt`` returns, so prompt embeddings made for a pipeline can be put
    together by hand; for SD 3::

        cond = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        uncond = {"prompt_embeds": negative_prompt_embeds, "pooled_prompt_embeds": negative_pooled_prompt_embeds}
        condition = Condition((prompt,), cond, uncond, guidance_scale=4.5)

    Attributes:
        prompts: B texts, which rewards score against.
        cond: encodings of the prompts, B rows each.
        uncond: encodings of the negative prompts, B rows each; None without classifier-free guidance.
        guidance_scale: s of ``u + s (c - u)``; 1 means no guidance.
        rescale: makes the guided velocity out of ``u + s (c - u)`` and c, for pipelines that go on from there.
    """

    prompts: tuple[str, ...]
    cond: Encoding
    uncond: Encoding | None = None
    guidance_scale: float = 1.0
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self):
        for branch in (self.cond, self.uncond or {}):
            for name, rows in branch.items():
                if rows.shape[0] != len(self.prompts):
                    raise ValueError(
                        f"condition: expected {len(self.prompts)} rows of {name}, one per prompt, got {rows.shape[0]}"
                    )
        if self.guidance_scale > 1 and self.uncond is None:
            raise ValueError(f"condition: guidance_scale {self.guidance_scale} needs encodings of a negative prompt")

    def __len__(self) -> int:
        return len(self.prompts)

    def guide(self, cond: Tensor, uncond: Tensor | None) -> Tensor:
        """The velocity of classifier-free guidance from those of the two branches; ``cond`` without a second one."""
        if uncond is None:
            return cond
        guided = uncond + self.guidance_scale * (cond - uncond)
        return guided if self.rescale is None else self.rescale(guided, cond)

    def to(self, device: torch.device | str) -> Condition:
        """The condition with its encodings on a device."""
        move = lambda branch: {name: t.to(device) for name, t in branch.items()}  # noqa: E731
        return replace(self, cond=move(self.cond), uncond=None if self.uncond is None else move(self.uncond))

    def rows(self, index) -> Condition:
        """The condition of some samples; ``index`` is a slice or a list of positions."""
        positions = list(range(len(self)))[index] if isinstance(index, slice) else list(index)
        pick = lambda branch: {name: t[positions] for name, t in branch.items()}  # noqa: E731
        return replace(
            self,
            prompts=tuple(self.prompts[p] for p in positions),
            cond=pick(self.cond),
            uncond=pick(self.uncond) if self.uncond is not None else None,
        )


def expand_rows(encoding: Encoding, batch: int) -> Encoding:
    """A one-row encoding for ``batch`` samples, without copying."""
    return {name: t.expand(batch, *t.shape[1:]) for name, t in encoding.items()}


def stack_rows(encodings: Sequence[Encoding]) -> Encoding:
    """The rows of several encodings in one. Texts of different length are padded with zeros at the end, which the masks
    of such encodings leave out.
    """
    stacked = {}
    for name in encodings[0]:
        parts = [encoding[name] for encoding in encodings]
        if parts[0].ndim > 1:
            longest = max(t.shape[1] for t in parts)
            parts = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1])) for t in parts]
        stacked[name] = torch.cat(parts)
    return stacked


def is_same_encoding(encoding: Encoding, one_row: Encoding) -> bool:
    """Whether every row of ``encoding`` encodes the text of ``one_row``, up to the rounding of bfloat16.

    Rounding matters because text encoders give slightly different numbers in batches of different size; another text
    is far outside of it.
    """
    if encoding.keys() != one_row.keys():
        return False
    for name, rows in encoding.items():
        row = one_row[name].to(rows.device, torch.float32)
        if rows.shape[1:] != row.shape[1:]:
            return False
        if rows.numel() and (rows.float() - row).abs().max() > 2**-7 * row.abs().max():
            return False
    return True
