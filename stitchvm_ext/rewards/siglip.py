"""SigLIP rewards in transformers' format."""

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

SCORES = ("logit", "probability", "cosine")


class SiglipReward(TextConditioned, HFViTReward):
    """Agreement of image and prompt by a ``SiglipModel`` of transformers. Its tower has no class token; an attention
    pool reads all patches.

    Settings:
        score_as: "logit" (default): exp(logit_scale) * cosine + logit_bias, about -15 for strangers, -3 to 5 for
            matching pairs. "probability": the logit's sigmoid, flat at both ends. "cosine": 0 to 0.2.
        logit_scale, logit_bias: the network's; the scale is a logarithm.

    Output tokens are the normalised sequence that the pool reads.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_score_as(self.settings["score_as"], SCORES)
        self.embed_dim = self.width
        self.text = TextEncoder(None if self.reference is None else partial(load_siglip_texts, **self.reference))

    @classmethod
    def from_pretrained(cls, name: str | Path, licence: str | None = None, score_as: str = "logit") -> SiglipReward:
        """Load by transformers' own functions.

        Args:
            name: a folder of ``SiglipModel`` (config.json, model.safetensors or pytorch_model.bin, tokenizer files;
                preprocessor_config.json, without which images are squashed to the network's size and brought to
                [-1, 1]), or a hub's "owner/model".

        Raises:
            OSError: a folder or file that is missing or cannot be read, or holds another kind of model.
            ValueError: a preprocessing that is not supported, or does not fit the network; an unknown ``score_as``.
        """
        from transformers import SiglipImageProcessor, SiglipModel

        check_score_as(score_as, SCORES)
        reference = {"name": portable_folder(name)}
        model = load_network(SiglipModel, reference["name"])
        side = model.config.vision_config.image_size
        processor = load_processor(
            reference["name"], lambda: SiglipImageProcessor(size={"height": side, "width": side})
        )
        reward = cls(
            model, config_dict(model.config.vision_config), processor_config(processor), reference, licence,
            score_as=score_as, logit_scale=model.logit_scale.item(), logit_bias=model.logit_bias.item(),
        )  # fmt: skip
        reward.text.tower = _texts(model, **reference).eval()
        return reward

    @classmethod
    def network(cls, model_config: dict) -> nn.Module:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        network = nn.Module()
        network.vision_model = SiglipVisionModel(SiglipVisionConfig(**model_config))
        return network

    def take_apart(self, model: nn.Module) -> None:
        tower = model.vision_model
        if not tower.use_head:
            raise ValueError("config.json: expected vision_use_head, the attention pool that embeds the image")
        self.keep_tower(
            tower.embeddings.patch_embedding,
            tower.embeddings.position_embedding.weight,
            [Unmasked(layer) for layer in tower.encoder.layers],
        )
        self.post_norm, self.pool = tower.post_layernorm, tower.head

    def finish(self, tokens: Tensor) -> RewardOutput:
        tokens = self.post_norm(tokens)
        return RewardOutput(tokens, self.pool(tokens))

    def score(self, output: RewardOutput, condition: Tensor | None) -> Tensor:
        cosine = self.cosine(output, condition)
        if self.settings["score_as"] == "cosine":
            return cosine
        logit = cosine * math.exp(self.settings["logit_scale"]) + self.settings["logit_bias"]
        return logit.sigmoid() if self.settings["score_as"] == "probability" else logit


def _texts(model: nn.Module, name: str) -> HFTexts:
    config = model.text_model.config
    return HFTexts(model.text_model, None, load_tokenize(name, config.max_position_embeddings, config.vocab_size))


def load_siglip_texts(name: str) -> HFTexts:
    """The text side of a ``SiglipModel`` folder."""
    from transformers import SiglipModel

    return _texts(load_network(SiglipModel, name), name)
