"""The pieces that pipelines, values and trainers are made of, each counted once by running the library's own code.

A denoiser is counted with one or two blocks of each kind and with one more of each; the blocks that the published one
has beyond these cost what the one more did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..backbones import DiffusionBackbone
from ..backbones.base import frozen
from ..backbones.conditioning import adaln_layers
from .architectures import Architecture
from .blocks import leading, scaled, scaled_number, with_one_more
from .count import Cost, count, fake_tensors
from .reward_pieces import RewardPieces, input_grad, parameters
from .variants import add_lora, checkpointing


class Pieces:
    """Costs of one combination of models.

    Args:
        architecture: of the pipeline.
        rewards: short names; their values share one prefix, their scores are added.
        resolution: of the square images.
        depth: i, of the stitched value.
        layer: j.
    """

    def __init__(self, architecture: Architecture, rewards: Sequence[str], resolution: int, depth: int, layer: int):
        self.architecture, self.resolution, self.depth = architecture, resolution, depth
        self.kinds = architecture.kinds()
        self.mode = fake_tensors()
        small = self._backbone(leading(self.kinds, 2))
        with self.mode:
            latents = architecture.latents(1, resolution)
        self.width, self.grid = small.width(1), small.grid(tuple(latents.shape[-2:]))
        self.rewards = RewardPieces(architecture, rewards, resolution, layer, self.grid, self.width, small, self.mode)
        self._counted: dict[tuple, Cost] = {}

    @lru_cache(maxsize=16)  # noqa: B019 (as long-lived as the pieces)
    def _backbone(self, kinds: tuple[int, ...]) -> DiffusionBackbone:
        with self.mode:
            return self.architecture.backbone(kinds)

    @property
    def entry(self) -> int:
        """Bytes of a number."""
        return self.architecture.dtype.itemsize

    # -- weights, bytes ------------------------------------------------------------------------------------------------

    @property
    def denoiser_bytes(self) -> int:
        buffers = sum(b.numel() for b in self._backbone(leading(self.kinds, 2)).denoiser.buffers())
        return self.entry * (self.architecture.parameters + buffers)

    @property
    def vae_bytes(self) -> int:
        return self.entry * parameters(self.rewards.vae)

    @property
    def rewards_bytes(self) -> int:
        return self.entry * self.rewards.tower_parameters

    @property
    def value_bytes(self) -> int:
        return self.entry * self.rewards.value_parameters

    @cached_property
    def modulation(self) -> tuple[int, int]:
        """Bytes of the linear layers that make the AdaLN vectors, and how many numbers they make, in all blocks; zeros
        where :func:`precompute_conditioning` does not know them.
        """
        if self.architecture.family != "SD3Transformer2DModel":
            return 0, 0
        base = leading(self.kinds, 2)
        sizes, outputs = [], []
        for kinds in with_one_more(base):
            linears = [norm.linear for norm in adaln_layers(self._backbone(kinds).denoiser)]
            sizes.append(self.entry * sum(map(parameters, linears)))
            outputs.append(sum(linear.out_features for linear in linears))
        return scaled_number(sizes, self.kinds, base), scaled_number(outputs, self.kinds, base)

    # -- the denoiser --------------------------------------------------------------------------------------------------

    def _over_blocks(self, key: tuple, first: int, measure: Callable[[DiffusionBackbone], Cost]) -> Cost:
        """The cost of something that runs all blocks of the denoiser, by the few of a smaller one."""
        if key not in self._counted:
            base = leading(self.kinds, first)
            with self.mode:
                costs = [measure(self._backbone(kinds)) for kinds in with_one_more(base)]
            self._counted[key] = scaled(costs, self.kinds, base)
        return self._counted[key]

    def _inputs(self, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.architecture.latents(batch, self.resolution), torch.zeros(batch), self.architecture.encoding(batch)

    def denoise(self, batch: int, *, fused: bool = False, lora: bool = False) -> Cost:
        """One pass without gradients. ``lora``: with adapters that are not merged."""

        def measure(backbone: DiffusionBackbone) -> Cost:
            inputs = self._inputs(batch)
            adapters = add_lora(backbone.denoiser) if lora else nullcontext()
            with torch.no_grad(), adapters, backbone.fused() if fused else nullcontext():
                return count(lambda: backbone.velocity(*inputs))

        return self._over_blocks(("denoise", batch, fused, lora), 2, measure)

    def denoise_input_grad(self, batch: int, *, checkpoint: bool = False) -> Cost:
        """A pass and the gradient of its latents."""

        def measure(backbone: DiffusionBackbone) -> Cost:
            latents, *others = self._inputs(batch)
            latents.requires_grad_()
            with checkpointing(backbone.denoiser, checkpoint):
                return count(lambda: backbone.velocity(latents, *others), lambda out: input_grad(out, latents))

        return self._over_blocks(("input grad", batch, checkpoint), 2, measure)

    def train(self, batch: int, *, checkpoint: bool = False) -> Cost:
        """A pass and the gradient of its LoRA weights."""

        def measure(backbone: DiffusionBackbone) -> Cost:
            inputs = self._inputs(batch)
            with add_lora(backbone.denoiser) as weights, checkpointing(backbone.denoiser, checkpoint):
                return count(
                    lambda: backbone.velocity(*inputs),
                    lambda out: torch.autograd.grad(out.float().square().mean(), weights),
                )

        return self._over_blocks(("train", batch, checkpoint), 2, measure)

    # -- the prefix ----------------------------------------------------------------------------------------------------

    def _rows(self) -> Tensor | None:
        return None if self.rewards.tokens_read is None else torch.empty(self.rewards.tokens_read, dtype=torch.int64)

    def prefix(self, batch: int, *, grad: bool = False, memory: str | None = None) -> Cost:
        """The first i blocks alone, and the gradient of the latents.

        Args:
            memory: of the library's fused and pruned pass; None for the blocks as diffusers has them.
        """
        key = ("prefix", batch, grad, memory)
        if key not in self._counted:
            with self.mode:
                backbone = self._backbone(leading(self.kinds, self.depth))
                latents, sigma, text = self._inputs(batch)
                latents.requires_grad_(grad)

                def forward():
                    if memory is None:
                        with frozen(backbone.denoiser):
                            return backbone.run_prefix(latents, sigma, text, self.depth)
                    return backbone.features(latents, sigma, text, self.depth, rows=self._rows(), memory=memory)

                with torch.set_grad_enabled(grad):
                    self._counted[key] = count(forward, (lambda out: input_grad(out, latents)) if grad else None)
        return self._counted[key]

    def shared_prefix(self, batch: int, memory: str) -> Cost:
        """A whole pass that keeps what the gradient of its first i blocks needs, and that gradient."""

        def measure(backbone: DiffusionBackbone) -> Cost:
            latents, sigma, text = self._inputs(batch)
            with backbone.fused():
                return count(
                    lambda: backbone.velocity_and_features(
                        latents, sigma, text, self.depth, rows=self._rows(), memory=memory
                    ),
                    lambda found: input_grad(found[1], found[2]),
                )

        return self._over_blocks(("shared prefix", batch, memory), self.depth + 1, measure)
