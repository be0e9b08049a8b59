"""What runs behind the denoiser: autoencoder, rewards on images, stitching layers and reward suffixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..rewards import RewardModel
from ..value.stitch_layer import StitchLayer
from .architectures import TOWERS, Architecture, build
from .blocks import leading, scaled, scaled_number, with_one_more
from .count import Cost, count, nested
from .variants import as_written, checkpointing


class RewardPieces:
    """Costs of the rewards of a pipeline. Towers are counted with a few layers and with one more.

    Args:
        architecture: of the pipeline.
        names: of the rewards, whose scores are added.
        resolution: of the square images.
        layer: j.
        grid, width: of the backbone's tokens.
        backbone: an adapter of the pipeline's denoiser, with however few blocks.
        mode: the fake tensors' mode.
    """

    def __init__(
        self, architecture: Architecture, names: Sequence[str], resolution: int, layer: int, grid, width, backbone, mode
    ):
        self.architecture, self.names, self.resolution, self.layer = architecture, names, resolution, layer
        self.grid, self.width, self.backbone, self.mode = grid, width, backbone, mode
        self.depths = tuple(TOWERS[name].layers for name in names)
        self.base = tuple(leading((depth,), max(2, layer + 1))[0] for depth in self.depths)
        with mode:
            self.vae = architecture.autoencoder()
            self.stitches = [build(lambda r=r: self._stitch(r), architecture.dtype) for r in self.towers(self.base)]
        read = [stitch.read_tokens(grid) for stitch in self.stitches]
        self.tokens_read = None if any(rows is None for rows in read) else len(torch.cat(read).unique())
        self._counted: dict[tuple, Cost] = {}

    @lru_cache(maxsize=8)  # noqa: B019 (as long-lived as the pieces)
    def towers(self, layers: tuple[int, ...]) -> list[RewardModel]:
        """The rewards with so many layers each."""
        with self.mode:
            return [TOWERS[name].build(n, self.architecture.dtype) for name, n in zip(self.names, layers, strict=True)]

    def _stitch(self, reward: RewardModel) -> StitchLayer:
        prefix = reward.num_prefix_tokens if self.layer > 1 else 0
        return StitchLayer(self.width, reward.width, reward.grid, prefix, with_position=self.layer > 1)

    # -- weights, numbers ----------------------------------------------------------------------------------------------

    @property
    def tower_parameters(self) -> int:
        """Of the image towers. Their text towers run once per prompt and need not stay."""
        sizes = [sum(map(parameters, self.towers(layers))) for layers in with_one_more(self.base)]
        return scaled_number(sizes, self.depths, self.base)

    @property
    def value_parameters(self) -> int:
        """Of stitching layers and suffixes: what a stitched value adds to the pipeline."""
        towers = self.towers(self.base)
        below = [module for r in towers for module in (r.visual.conv1, *r.blocks[: self.layer - 1])]
        return self.tower_parameters + sum(map(parameters, self.stitches)) - sum(map(parameters, below))

    # -- counting ------------------------------------------------------------------------------------------------------

    def _over_layers(self, key: tuple, measure: Callable[[list[RewardModel]], Cost]) -> Cost:
        if key not in self._counted:
            with self.mode:
                costs = [measure(self.towers(layers)) for layers in with_one_more(self.base)]
            self._counted[key] = scaled(costs, self.depths, self.base)
        return self._counted[key]

    def _pass(self, key: tuple, run: Callable[[Tensor], Tensor], make: Callable[[], Tensor], grad: bool) -> Cost:
        """A pass over what ``make`` gives, and the gradient of that."""
        if key not in self._counted:
            with self.mode:
                self._counted[key] = _differentiated(run, make(), grad)
        return self._counted[key]

    # -- the autoencoder -----------------------------------------------------------------------------------------------

    def decode(self, batch: int, *, grad: bool = False, checkpoint: bool = False) -> Cost:
        """Latents to images, and the gradient of the latents."""
        with checkpointing(self.vae, checkpoint):
            return self._pass(
                ("decode", batch, grad, checkpoint),
                lambda z: self.backbone.decode_latents(self.vae, z),
                lambda: self.architecture.latents(batch, self.resolution).float(),
                grad,
            )

    def encode(self, batch: int) -> Cost:
        return self._pass(
            ("encode", batch), lambda x: self.backbone.encode_images(self.vae, x), lambda: self._images(batch), False
        )

    # -- rewards on images ---------------------------------------------------------------------------------------------

    def reward(self, batch: int, *, grad: bool = False) -> Cost:
        """The rewards' image towers on images, and the gradient of the images."""

        def measure(towers: list[RewardModel]) -> Cost:
            def run(images: Tensor) -> Tensor:
                return sum(r.score(r.output(images, pooled_only=True), _prompts(r, batch)) for r in towers)

            return _differentiated(run, self._images(batch), grad)

        return self._over_layers(("reward", batch, grad), measure)

    def decode_reward(self, batch: int, *, grad: bool = False, checkpoint: bool = False) -> Cost:
        """The rewards of decoded latents, and the gradient of the latents."""
        decode = self.decode(batch, grad=grad, checkpoint=checkpoint)
        return nested(decode, self.reward(batch, grad=grad))

    # -- stitched ------------------------------------------------------------------------------------------------------

    def suffix(self, batch: int, *, grad: bool = False, memory: str | None = None) -> Cost:
        """Stitching layers and reward suffixes, and the gradient of the tokens.

        Args:
            memory: of the library's fused and pruned pass; None for the blocks as open_clip has them.
        """

        def measure(towers: list[RewardModel]) -> Cost:
            def run(tokens: Tensor) -> Tensor:
                scores = []
                for stitch, r in zip(self.stitches, towers, strict=True):
                    entering = stitch(tokens, self.grid)
                    output = r.forward_from(entering, self.layer, memory or "save", pooled_only=memory is not None)
                    scores.append(r.score(output, _prompts(r, batch)))
                return sum(scores)

            blocks = [block for r in towers for block in r.blocks]
            with as_written(blocks) if memory is None else nullcontext():
                return _differentiated(run, self._tokens(batch), grad)

        return self._over_layers(("suffix", batch, grad, memory), measure)

    def train_suffix(self, batch: int) -> Cost:
        """A finetuning pass of stitching layers and suffixes: the gradient of their weights."""

        def measure(towers: list[RewardModel]) -> Cost:
            tokens, modules = self._tokens(batch), [*self.stitches, *towers]

            def run() -> Tensor:
                losses = []
                for stitch, r in zip(self.stitches, towers, strict=True):
                    output = r.forward_from(stitch(tokens, self.grid), self.layer)
                    losses.append(output.tokens.float().square().mean() + output.normalized.square().mean())
                return sum(losses)

            try:
                for module in modules:
                    module.requires_grad_(True)
                weights = [p for module in modules for p in module.parameters()]
                return count(run, lambda loss: torch.autograd.grad(loss, weights, allow_unused=True))
            finally:
                for module in modules:
                    module.requires_grad_(False)

        return self._over_layers(("train suffix", batch), measure)

    def _images(self, batch: int) -> Tensor:
        return torch.empty(batch, 3, self.resolution, self.resolution)

    def _tokens(self, batch: int) -> Tensor:
        return torch.empty(batch, self.grid[0] * self.grid[1], self.width, dtype=self.architecture.dtype)


def _differentiated(run: Callable[[Tensor], Tensor], leaf: Tensor, grad: bool) -> Cost:
    leaf.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        return count(lambda: run(leaf), (lambda out: input_grad(out, leaf)) if grad else None)


def input_grad(output: Tensor, leaf: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    return grad


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _prompts(reward: RewardModel, batch: int) -> Tensor:
    return torch.empty(batch, reward.embed_dim)
