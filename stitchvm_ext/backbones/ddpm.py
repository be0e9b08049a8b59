"""What backbones of the DDPM kind have in common."""

from __future__ import annotations

from torch import Tensor, nn

from .base import DiffusionBackbone
from .process import DDPM


class DDPMBackbone(DiffusionBackbone):
    """A model whose noise levels and prediction type are written in its pipeline's scheduler.

    Args:
        pixel_factor: pixels per latent position: the size of the image, which some of these models read, is taken from
            the latents.
    """

    def __init__(self, denoiser: nn.Module, process: DDPM, pixel_factor: int):
        super().__init__(denoiser, process)
        self._pixel_factor = pixel_factor

    @classmethod
    def from_pipe(cls, pipe, denoiser: nn.Module) -> DDPMBackbone:
        """The adapter of a pipeline's denoiser. Raises ValueError for a bare one."""
        if pipe is denoiser:
            raise ValueError(
                "backbone: expected the pipeline, whose scheduler holds the noise levels and the prediction type, "
                f"got a bare {type(denoiser).__name__}"
            )
        return cls(denoiser, DDPM.from_scheduler(pipe.scheduler), pipe.vae_scale_factor)

    def image_size(self, latents: Tensor) -> tuple[int, int]:
        """(height, width) in pixels of the image of some latents."""
        h, w = latents.shape[-2:]
        return h * self._pixel_factor, w * self._pixel_factor

    def unpack(self, output: Tensor, latents: Tensor) -> Tensor:
        return output[:, : self.latent_channels]  # a learned variance, in further channels, is left out
