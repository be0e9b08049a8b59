"""The playground's pipeline class."""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline


class PlaygroundPipeline(StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline for a model that was trained without a T5 encoder.

    Where there is no T5, the stock pipeline appends ``max_sequence_length`` zero rows to the text; the playground's
    transformer never saw such rows. A stock pipeline called with ``max_sequence_length=0`` does the same as this one.
    """

    def encode_prompt(self, *args, max_sequence_length: int = 0, **kwargs):
        return super().encode_prompt(*args, max_sequence_length=0, **kwargs)
