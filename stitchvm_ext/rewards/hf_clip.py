"""CLIP rewards in transformers' format: PickScore, and any other ``CLIPModel`` folder."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from .base import RewardOutput, check_score_as
from .hf_vit import (
    HFTexts,
    HFViTReward,
    Unmasked,
    config_dict,
    load_network,
    load_processor,
    load_tokenize,
    portable_folder,
    processor_config,
)
from .text import TextConditioned, TextEncoder

SCORES = ("logit", "cosine")


class HFClipReward(TextConditioned, HFViTReward):
    """Agreement of image and prompt by a ``CLIPModel`` of transformers, such as PickScore v1.

    Settings:
        score_as: "logit" (default): exp(logit_scale) * cosine, as PickScore is published: 18 to 24 on generated images,
            where a difference of 1 makes a preference of 73 %. "cosine": without the scale, 0.18 to 0.24 there.
        logit_scale: the network's, a logarithm.

    Output tokens are the last block's: the tower normalises after pooling.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_score_as(self.settings["score_as"], SCORES)
        self.embed_dim = self.model_config["projection_dim"]
        self.text = TextEncoder(None if self.reference is None else partial(load_clip_texts, **self.reference))

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        licence: str | None = None,
        score_as: str = "logit",
        tokenizer: str | Path | None = None,
    ) -> HFClipReward:
        """Load by transformers' own functions.

        Args:
            name: a folder of ``CLIPModel`` (config.json, model.safetensors or pytorch_model.bin; tokenizer files;
                preprocessor_config.json, without which CLIP's own preprocessing is used), or a hub's "owner/model".
            tokenizer: where the tokenizer lies, if not there.

        Raises:
            OSError: a folder or file that is missing or cannot be read, or holds another kind of model.
            ValueError: a preprocessing that is not supported, or does not fit the network; an unknown ``score_as``.
        """
        from transformers import CLIPImageProcessor, CLIPModel

        check_score_as(score_as, SCORES)
        tokenizer = None if tokenizer is None else portable_folder(tokenizer)
        reference = {"name": portable_folder(name), "tokenizer": tokenizer}
        model = load_network(CLIPModel, reference["name"])
        side = model.config.vision_config.image_size
        processor = load_processor(
            reference["name"],
            lambda: CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        )
        # The tower on its own reads this width from its own configuration, where checkpoints may have another.
        model_config = {**config_dict(model.config.vision_config), "projection_dim": model.config.projection_dim}
        reward = cls(
            model, model_config, processor_config(processor), reference, licence,
            score_as=score_as, logit_scale=model.logit_scale.item(),
        )  # fmt: skip
        reward.text.tower = _texts(model, **reference).eval()
        return reward

    @classmethod
    def network(cls, model_config: dict) -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection(CLIPVisionConfig(**model_config))

    def take_apart(self, model: nn.Module) -> None:
        tower = model.vision_model
        self.keep_tower(
            tower.embeddings.patch_embedding,
            tower.embeddings.position_embedding.weight,
            [Unmasked(layer) for layer in tower.encoder.layers],
            prefix=tower.embeddings.class_embedding[None],
            pre_norm=tower.pre_layrnorm,
        )
        self.post_norm, self.projection = tower.post_layernorm, model.visual_projection
        self.pooled_tokens = (0,)

    def finish(self, tokens: Tensor) -> RewardOutput:
        return RewardOutput(tokens, self.projection(self.post_norm(tokens[:, 0])))

    def score(self, output: RewardOutput, condition: Tensor | None) -> Tensor:
        cosine = self.cosine(output, condition)
        return cosine if self.settings["score_as"] == "cosine" else cosine * self.scale

    @property
    def scale(self) -> float:
        return math.exp(self.settings["logit_scale"])


def _texts(model: nn.Module, name: str, tokenizer: str | None) -> HFTexts:
    config = model.text_model.config
    tokenize = load_tokenize(tokenizer or name, config.max_position_embeddings, config.vocab_size)
    return HFTexts(model.text_model, model.text_projection, tokenize)


def load_clip_texts(name: str, tokenizer: str | None) -> HFTexts:
    """The text side of a ``CLIPModel`` folder."""
    from transformers import CLIPModel

    return _texts(load_network(CLIPModel, name), name, tokenizer)
