"""The pieces that pipelines, values and trainers are made of, each counted once by running the library's own code.

A denoiser is counted with one or two blocks of each kind and with one more of each; the blocks that the published one
has beyond these cost what the one more did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from ..backbones import DiffusionBackbone
from ..backbones.base import frozen
from ..backbones.conditioning import adaln_layers
from ..value.stitch_layer import StitchLayer
from .architectures import TOWERS, Architecture, build
from .count import Cost, count, fake_tensors
from .variants import add_lora, as_written, checkpointing

ENTRY = 2  # bytes of a bfloat16 number


def leading(kinds: Sequence[int], first: int) -> tuple[int, ...]:
    """The fewest blocks of each kind that hold the ``first`` ones whole, and one of every kind at least."""
    found, left = [], first
    for blocks in kinds:
        found.append(min(blocks, max(left, 1)))
        left -= found[-1]
    return tuple(found)


def scaled(costs: Sequence[Cost], kinds: Sequence[int], base: Sequence[int]) -> Cost:
    """The cost with ``kinds`` blocks from that with ``base`` blocks, ``costs[0]``, and with one more of each kind."""
    first, *others = costs
    kernels, peak, kept = Counter(first.kernels), first.peak, first.kept
    for other, blocks, have in zip(others, kinds, base, strict=True):
        for kernel, often in other.kernels.items():
            kernels[kernel] += (blocks - have) * (often - first.kernels[kernel])
        peak += (blocks - have) * (other.peak - first.peak)
        kept += (blocks - have) * (other.kept - first.kept)
    return Cost(+kernels, peak, kept)


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
        self.architecture, self.resolution, self.depth, self.layer = architecture, resolution, depth, layer
        self.kinds = architecture.kinds()
        self.mode = fake_tensors()
        with self.mode:
            self.vae = architecture.autoencoder()
            self.rewards = [TOWERS[name].build() for name in rewards]
            grid = self._backbone(leading(self.kinds, 2)).grid(tuple(architecture.latents(1, resolution).shape[-2:]))
            self.stitches = [build(lambda r=r: self._stitch(r)) for r in self.rewards]
        self.grid = grid
        read = [stitch.read_tokens(grid) for stitch in self.stitches]
        self.tokens_read = None if any(rows is None for rows in read) else len(torch.cat(read).unique())
        self._counted: dict[tuple, Cost] = {}

    def _stitch(self, reward) -> StitchLayer:
        prefix = reward.num_prefix_tokens if self.layer > 1 else 0
        return StitchLayer(self.width, reward.width, reward.grid, prefix, with_position=self.layer > 1)

    @cached_property
    def width(self) -> int:
        return self._backbone(leading(self.kinds, 2)).width(1)

    @lru_cache(maxsize=16)  # noqa: B019 (as long-lived as the pieces)
    def _backbone(self, kinds: tuple[int, ...]) -> DiffusionBackbone:
        with self.mode:
            return self.architecture.backbone(kinds)

    # -- weights, bytes ------------------------------------------------------------------------------------------------

    @property
    def denoiser_bytes(self) -> int:
        buffers = sum(b.numel() for b in self._backbone(leading(self.kinds, 2)).denoiser.buffers())
        return ENTRY * (self.architecture.parameters + buffers)

    @property
    def vae_bytes(self) -> int:
        return _bytes(self.vae)

    @property
    def rewards_bytes(self) -> int:
        """The image towers. Their text towers run once per prompt and need not stay."""
        return sum(_bytes(reward) for reward in self.rewards)

    @property
    def value_bytes(self) -> int:
        """Stitching layers and suffixes: what a stitched value adds to the pipeline."""
        return sum(_bytes(m) for m in (*self.rewards, *self.stitches)) - sum(
            _bytes(reward.visual.conv1) for reward in self.rewards
        )

    @cached_property
    def modulation(self) -> tuple[int, int]:
        """Bytes of the linear layers that make the AdaLN vectors, and how many numbers they make, in all blocks; zeros
        where :func:`precompute_conditioning` does not know them.
        """
        if self.architecture.family != "SD3Transformer2DModel":
            return 0, 0
        base = leading(self.kinds, 2)
        found = []
        for kinds in self._with_one_more(base):
            linears = [norm.linear for norm in adaln_layers(self._backbone(kinds).denoiser)]
            found.append((sum(map(_bytes, linears)), sum(linear.out_features for linear in linears)))
        (size, outputs), *others = found
        for (more, more_outputs), blocks, have in zip(others, self.kinds, base, strict=True):
            size += (blocks - have) * (more - found[0][0])
            outputs += (blocks - have) * (more_outputs - found[0][1])
        return size, outputs

    # -- the denoiser --------------------------------------------------------------------------------------------------

    def _with_one_more(self, base: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [base, *(tuple(n + (k == kind) for k, n in enumerate(base)) for kind in range(len(base)))]

    def _over_blocks(self, key: tuple, first: int, measure: Callable[[DiffusionBackbone], Cost]) -> Cost:
        """The cost of something that runs all blocks of the denoiser, by the few of a smaller one."""
        if key not in self._counted:
            base = leading(self.kinds, first)
            with self.mode:
                costs = [measure(self._backbone(kinds)) for kinds in self._with_one_more(base)]
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
                return count(lambda: backbone.velocity(latents, *others), lambda out: _grad(out, latents))

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
        return None if self.tokens_read is None else torch.empty(self.tokens_read, dtype=torch.int64)

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
                    self._counted[key] = count(forward, (lambda out: _grad(out, latents)) if grad else None)
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
                    lambda found: _grad(found[1], found[2]),
                )

        return self._over_blocks(("shared prefix", batch, memory), self.depth + 1, measure)

    # -- rewards, stitched and on images -------------------------------------------------------------------------------

    def suffix(self, batch: int, *, grad: bool = False, memory: str | None = None) -> Cost:
        """Stitching layers and reward suffixes, and the gradient of the tokens."""
        key = ("suffix", batch, grad, memory)
        if key not in self._counted:
            with self.mode:
                tokens = torch.empty(batch, self.grid[0] * self.grid[1], self.width, dtype=torch.bfloat16)
                tokens.requires_grad_(grad)

                def forward():
                    return sum(
                        reward.score(
                            reward.forward_from(
                                stitch(tokens, self.grid), self.layer, memory or "save", pooled_only=memory is not None
                            ),
                            self._prompts(reward, batch),
                        )
                        for stitch, reward in zip(self.stitches, self.rewards, strict=True)
                    )

                blocks = [block for reward in self.rewards for block in reward.blocks]
                with torch.set_grad_enabled(grad), as_written(blocks) if memory is None else nullcontext():
                    self._counted[key] = count(forward, (lambda out: _grad(out, tokens)) if grad else None)
        return self._counted[key]

    def train_suffix(self, batch: int) -> Cost:
        """A finetuning pass of stitching layers and suffixes: the gradient of their weights."""
        key = ("train suffix", batch)
        if key not in self._counted:
            with self.mode:
                tokens = torch.empty(batch, self.grid[0] * self.grid[1], self.width, dtype=torch.bfloat16)
                modules = [*self.stitches, *self.rewards]
                for module in modules:
                    module.requires_grad_(True)

                def forward():
                    loss = 0
                    for stitch, reward in zip(self.stitches, self.rewards, strict=True):
                        output = reward.forward_from(stitch(tokens, self.grid), self.layer)
                        loss = loss + output.tokens.float().square().mean() + output.normalized.square().mean()
                    return loss

                weights = [p for module in modules for p in module.parameters()]
                cost = count(forward, lambda loss: torch.autograd.grad(loss, weights, allow_unused=True))
                for module in modules:
                    module.requires_grad_(False)
            self._counted[key] = cost
        return self._counted[key]

    def decode(self, batch: int) -> Cost:
        return self._simple(("decode", batch), lambda z: self._decode(z), self._latents32(batch))

    def encode(self, batch: int) -> Cost:
        backbone = self._backbone(leading(self.kinds, 2))
        return self._simple(("encode", batch), lambda x: backbone.encode_images(self.vae, x), self._images(batch))

    def reward(self, batch: int) -> Cost:
        """The rewards' image towers on images."""
        return self._simple(("reward", batch), self._score, self._images(batch))

    def decode_reward(self, batch: int, *, grad: bool = False, checkpoint: bool = False) -> Cost:
        """Decoder and rewards on clean latents, and the gradient of the latents."""
        key = ("decode and reward", batch, grad, checkpoint)
        if not grad:
            return self._simple(key, lambda z: self._score(self._decode(z)), self._latents32(batch))
        if key not in self._counted:
            with self.mode, checkpointing(self.vae, checkpoint):
                latents = self._latents32(batch)().requires_grad_()
                self._counted[key] = count(lambda: self._score(self._decode(latents)), lambda out: _grad(out, latents))
        return self._counted[key]

    def _simple(self, key: tuple, run: Callable[[Tensor], object], make: Callable[[], Tensor]) -> Cost:
        if key not in self._counted:
            with self.mode, torch.no_grad():
                given = make()
                self._counted[key] = count(lambda: run(given))
        return self._counted[key]

    def _latents32(self, batch: int) -> Callable[[], Tensor]:
        return lambda: self.architecture.latents(batch, self.resolution).float()

    def _images(self, batch: int) -> Callable[[], Tensor]:
        return lambda: torch.empty(batch, 3, self.resolution, self.resolution)

    def _decode(self, latents: Tensor) -> Tensor:
        return self._backbone(leading(self.kinds, 2)).decode_latents(self.vae, latents)

    def _score(self, images: Tensor) -> Tensor:
        return sum(
            reward.score(reward.output(images, pooled_only=True), self._prompts(reward, len(images)))
            for reward in self.rewards
        )

    def _prompts(self, reward, batch: int) -> Tensor:
        return torch.empty(batch, reward.embed_dim)


def _bytes(module: nn.Module) -> int:
    return ENTRY * sum(p.numel() for p in module.parameters())


def _grad(output: Tensor, leaf: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    return grad
