"""The text side of rewards that compare an image with its prompt.

The text tower is no registered part of a reward: it belongs to a plain object, :class:`TextEncoder`, that a full reward
and its suffixes share. It is never trained, never saved, and read from the original reward when first needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import RewardModel, RewardOutput

CACHED_PROMPTS = 4096


class TextEncoder:
    """A text tower and a cache of its last ``CACHED_PROMPTS`` embeddings.

    Args:
        load: reads the tower when a prompt is first encoded: a module from a list of strings to embeddings [B, D].
            None if it exists in memory only.
        tower: the tower, if it is at hand.
    """

    def __init__(self, load: Callable[[], nn.Module] | None, tower: nn.Module | None = None):
        self.load, self.tower = load, tower
        self.cache: OrderedDict[str, Tensor] = OrderedDict()

    def __deepcopy__(self, memo) -> TextEncoder:
        return self  # frozen and stateless but for its cache: copies of a reward share it

    def _load(self) -> None:
        if self.load is None:
            raise ValueError(
                "prompts: this value model's reward was built in memory, so its text tower cannot be found again; "
                "expected text embeddings [B, D] of the original reward instead of prompts"
            )
        self.tower = self.load().eval().requires_grad_(False)

    def __call__(self, prompts: list[str] | tuple[str, ...], device: torch.device) -> Tensor:
        """Normalised text embeddings, float32 [B, D]."""
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompts: expected a list of strings, got {prompts!r}")
        missing = list(dict.fromkeys(p for p in prompts if p not in self.cache))
        found = {p: self.cache[p] for p in prompts if p in self.cache}
        if missing and self.tower is None:
            self._load()
        # Never as inference tensors: autograd may save them in a later call.
        with torch.inference_mode(False), torch.no_grad():
            for prompt in missing:  # alone: in a batch its last bits would depend on what happened to be cached before
                found[prompt] = F.normalize(self.tower.to(device)([prompt]).float(), dim=-1).cpu()[0]
        for p in found:
            self.cache[p] = found[p]
            self.cache.move_to_end(p)
        while len(self.cache) > CACHED_PROMPTS:
            self.cache.popitem(last=False)
        return torch.stack([found[p] for p in prompts]).to(device)


class TextConditioned(RewardModel):
    """A reward whose condition is the prompts' normalised text embeddings. Subclasses set ``text`` and ``embed_dim``.

    Attributes:
        text: the text tower, shared with suffixes.
        embed_dim: D of image and text embeddings.
    """

    text: TextEncoder
    embed_dim: int

    def encode_condition(self, prompts: list[str] | tuple[str, ...] | Tensor) -> Tensor:
        """Normalised text embeddings, float32 [B, D], of prompts; or of text embeddings [B, D] computed elsewhere.

        Raises:
            ValueError: prompts for a suffix whose original reward is not known; embeddings of another width.
            OSError: the original reward, needed for its text tower, cannot be loaded.
        """
        if not isinstance(prompts, Tensor):
            return self.text(prompts, self.device)
        if prompts.ndim != 2 or prompts.shape[1] != self.embed_dim:
            raise ValueError(
                f"prompts: expected strings or text embeddings [B, {self.embed_dim}], got shape {list(prompts.shape)}"
            )
        return F.normalize(prompts.to(self.device, torch.float32), dim=-1)

    def cosine(self, output: RewardOutput, condition: Tensor | None) -> Tensor:
        """Cosine [B] of image and text embeddings."""
        if condition is None:
            raise ValueError("prompts: this reward compares images with texts; expected one prompt per image, got None")
        image = output.normalized
        if condition.shape != image.shape:
            raise ValueError(f"condition: expected text embeddings {list(image.shape)}, got {list(condition.shape)}")
        return (image * condition).sum(-1)

    def suffix(self, layer: int) -> TextConditioned:
        suffix = super().suffix(layer)
        suffix.text = self.text
        return suffix
