"""The base class of rewards: an image network cut into embed, blocks and finish.

``blocks[j-1:]`` and ``finish`` are the suffix that a stitched value model keeps (METHOD.md §2). ``j`` counts from 1: at
j = 1 the stitch replaces the patch embedding's output, at j > 1 the output of block j - 1.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused.vit_block import is_vit_block, vit_block


@dataclass
class RewardOutput:
    """What the suffix yields.

    Attributes:
        tokens: [B, P+N, C], the sequence that pooling reads: h of METHOD.md §4. Where the network normalises the whole
            sequence before it pools, that is the normalised one.
        embedding: [B, D], not normalised.
    """

    tokens: Tensor
    embedding: Tensor

    @property
    def normalized(self) -> Tensor:
        return F.normalize(self.embedding.float(), dim=-1)


class RewardModel(nn.Module):
    """A pretrained image reward. Images are float [B, 3, H, W] in [0, 1].

    Subclasses hold the network, and say how it is cut (:meth:`patch_tokens`, :meth:`enter`, ``blocks``,
    :meth:`finish`), how a prompt is encoded and how an embedding is scored. ``distillation`` names the loss of
    METHOD.md §4 that suits the reward: "embedding" (squared L2 on tokens and normalised embedding) or "score" (smooth
    L1 on tokens, embedding and score).
    """

    blocks: nn.ModuleList
    width: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pooled_tokens: tuple[int, ...] | None = None  # positions whose tokens alone make the embedding; None: all
    distillation: str = "embedding"
    kept_from: int = 0  # 0 is the whole image network; j >= 1 the suffix from block j (see :meth:`suffix`)

    # -- what a subclass says ------------------------------------------------------------------------------------------

    @abstractmethod
    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Patch embeddings [B, N, C] of normalised pixels, before class token and position."""

    @abstractmethod
    def enter(self, patches: Tensor) -> Tensor:
        """Tokens [B, P+N, C] that enter the first block: class token, position and the norm before the blocks."""

    @abstractmethod
    def finish(self, tokens: Tensor) -> RewardOutput:
        """Final norm, pooling and projection of the last block's tokens."""

    @abstractmethod
    def encode_condition(self, prompts: list[str] | tuple[str, ...]) -> Any:
        """What :meth:`score` needs of the prompts (for CLIP: text embeddings [B, D]); cached per prompt. None if
        nothing.
        """

    @abstractmethod
    def score(self, output: RewardOutput, condition: Any) -> Tensor:
        """Reward [B] in float32; larger is better."""

    @abstractmethod
    def preprocess(self, images: Tensor) -> Tensor:
        """Resize and normalise images [B, 3, H, W] in [0, 1], differentiably, as the reference preprocessing does."""

    @abstractmethod
    def describe(self) -> dict:
        """JSON-ready: the class's name in the registry, where the weights came from, licence, and how to build the
        suffix.
        """

    @classmethod
    @abstractmethod
    def suffix_from_config(cls, config: dict, layer: int) -> RewardModel:
        """The suffix r_{>=j} of a reward that :meth:`describe` described, its weights not yet set.

        Trainable, except for heads that METHOD.md §4 freezes. Raises ValueError for a layer the reward does not have.
        """

    # -- written once --------------------------------------------------------------------------------------------------

    def head_parameters(self):
        """Parameters of the scoring head, which distillation keeps frozen (METHOD.md §4); none unless a subclass has a
        head.
        """
        return ()

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def check_layer(self, layer: int) -> None:
        first = max(1, self.kept_from)
        if not first <= layer <= self.num_layers:
            raise ValueError(f"layer (j): expected a reward block in {first}..{self.num_layers}, got {layer}")

    def suffix(self, layer: int) -> RewardModel:
        """A trainable copy of r_{>=j} that holds nothing else: no patch embedding, no blocks below j.

        ``forward_from`` takes the same j as here; its state dict fits :meth:`suffix_from_config` of the same
        description.
        """
        self.check_layer(layer)
        suffix = type(self).suffix_from_config(self.describe(), layer).to(self.device, self.dtype)
        weights = self.state_dict()
        suffix.load_state_dict({name: weights[name] for name in suffix.state_dict()})
        return suffix

    def check_whole(self) -> None:
        if self.kept_from:
            raise ValueError(
                f"images: expected the whole reward; this is its suffix from block {self.kept_from} on, which takes "
                "tokens by forward_from"
            )

    def check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape [B, 3, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images: expected floating point in [0, 1], got {images.dtype}")

    def entering_tokens(self, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
        """What a stitch at each j has to produce: for j = 1 patch embeddings [B, N, C], else tokens [B, P+N, C] after
        block j-1.
        """
        self.check_images(images)
        self.check_whole()
        for layer in layers:
            self.check_layer(layer)
        patches = self.patch_tokens(self.preprocess(images))
        found = {1: patches} if 1 in layers else {}
        tokens = self.enter(patches)
        for layer in range(2, max(layers) + 1):
            tokens = run_block(self.blocks[layer - 2], tokens)
            if layer in layers:
                found[layer] = tokens
        return found

    def forward_from(self, tokens: Tensor, layer: int, memory: str = "save", pooled_only: bool = False) -> RewardOutput:
        """The suffix r_{>=j}. Frozen blocks that the fused ops know run on them.

        Args:
            tokens: patch embeddings [B, N, C] for j = 1, tokens with prefix [B, P+N, C] for j > 1.
            layer: j.
            memory: what fused blocks keep for the backward, "save" or "recompute".
            pooled_only: only the embedding will be read; the last block may then compute nothing but the tokens that
                pooling reads, and the output's other tokens are not defined.
        """
        self.check_layer(layer)
        if layer == 1:
            tokens = self.enter(tokens)
        *blocks, last = self.blocks[layer - 1 :]
        for block in blocks:
            tokens = run_block(block, tokens, memory)
        tokens = run_block(last, tokens, memory, self.pooled_tokens if pooled_only else None)
        return self.finish(tokens)

    def output(self, images: Tensor, pooled_only: bool = False) -> RewardOutput:
        """The whole image network on images [B, 3, H, W] in [0, 1]. A suffix has no such pass and raises ValueError.

        ``pooled_only`` as for :meth:`forward_from`.
        """
        self.check_images(images)
        self.check_whole()
        return self.forward_from(self.patch_tokens(self.preprocess(images)), 1, pooled_only=pooled_only)

    def forward(self, images: Tensor, prompts: list[str] | tuple[str, ...] | None = None) -> Tensor:
        """Reward [B] of images [B, 3, H, W] in [0, 1] for their prompts."""
        if prompts is not None and len(prompts) != len(images):
            raise ValueError(f"prompts: expected {len(images)}, one per image, got {len(prompts)}")
        condition = self.encode_condition(prompts) if prompts is not None else None
        return self.score(self.output(images, pooled_only=True), condition)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def skip_blocks(suffix: RewardModel, layer: int) -> RewardModel:
    """A suffix from j = 1 on without its blocks below ``layer``: class token, position and first norm, then that block.

    In place. What METHOD.md §2 says word by word for j > 1; ``forward_from`` takes j = 1.
    """
    suffix.check_layer(layer)
    for below in range(layer - 1):  # empty places keep the numbering of the blocks
        suffix.blocks[below] = nn.Identity()
    return suffix


def check_score_as(score_as: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless a reward knows this way of scoring."""
    if score_as not in known:
        raise ValueError(f"score_as: expected one of {known}, got {score_as!r}")


def run_block(block: nn.Module, tokens: Tensor, memory: str = "save", read: tuple[int, ...] | None = None) -> Tensor:
    """A block of an image tower on tokens [B, N, C]: on the fused ops if it is frozen and they know it.

    With ``read``, tokens at other positions are not needed.
    """
    if not is_vit_block(block, tokens):
        return block(tokens)
    rows = None if read is None else torch.tensor(read, device=tokens.device)
    return vit_block(block, tokens, memory, rows)
