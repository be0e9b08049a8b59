"""A detector as reward: YOLOS, a plain ViT whose detection tokens each report an object or none."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import RewardOutput, check_score_as
from .classifier import class_index
from .hf_vit import HFViTReward, config_dict, load_network, load_processor, portable_folder, processor_config
from .preprocessing import detector_size

SCORES = ("presence", "count")


class PositionedBlock(nn.Module):
    """An encoder layer and what some YOLOS add after it: a position embedding of its own."""

    def __init__(self, layer: nn.Module, position: Tensor | None):
        super().__init__()
        self.layer = layer
        self.position = None if position is None else nn.Parameter(position.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.layer(tokens)
        return tokens if self.position is None else tokens + self.position


class YolosReward(HFViTReward):
    """Presence or number of a class of objects, by a ``YolosForObjectDetection`` of transformers. Needs no prompt.

    With p_d the probability that detection token d reports the class:

    - ``score_as="presence"`` (default): log(1 - Π(1 - p_d)), the log-probability that at least one does. A smooth
      maximum: it lies between the largest log p_d and the logarithm of their sum. At most 0; below about -3 where there
      is no such object.
    - ``score_as="count"``: Σ p_d, the expected number, 0 to the number of detection tokens; with ``target``, minus the
      smooth-L1 distance of it to that, at most 0.

    Tokens stand in the order [class token, detection tokens, patches], where transformers has the detection tokens
    last; attention does not mind. The prefix is the class token and the detection tokens, positions already added by
    the time that a block is entered. Output tokens are normalised; the embedding is the mean detection token, and the
    score reads all of them. The classifier stays frozen in suffixes; boxes are not computed.

    Settings: class_index, score_as, target; ``edges``, the shortest and longest edge of the processor.
    """

    distillation = "score"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_score_as(self.settings["score_as"], SCORES)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        label: int | str,
        licence: str | None = None,
        score_as: str = "presence",
        target: float | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> YolosReward:
        """Load by transformers' own functions.

        Args:
            name: a folder of ``YolosForObjectDetection`` (config.json, model.safetensors or pytorch_model.bin;
                preprocessor_config.json, without which it is YOLOS' own: edges of 800 and 1333), or "owner/model".
            label: the class, by number or by a name of config.json's ``id2label``.
            target: the number wanted, with ``score_as="count"``.
            image_size: (H, W) of the images to be scored, or others of their aspect ratio; None for square ones. It
                settles the image size of the network, to which the positions are brought once.

        Raises:
            OSError: a folder or file that is missing or cannot be read, or holds another kind of model.
            ValueError: an unknown label or ``score_as``; a preprocessing that is not supported.
        """
        from transformers import YolosForObjectDetection, YolosImageProcessor

        check_score_as(score_as, SCORES)
        if target is not None and score_as != "count":
            raise ValueError(f"target: expected None unless score_as is 'count', got {target}")
        name = portable_folder(name)
        processor = load_processor(name, YolosImageProcessor)
        size = processor.size
        if not (size.shortest_edge and size.longest_edge):
            raise ValueError(f"preprocessor_config.json: expected size by shortest_edge and longest_edge, got {size}")
        edges = [size.shortest_edge, size.longest_edge]
        own = detector_size(*(image_size or (edges[0], edges[0])), *edges)
        processor.size = type(size)(height=own[0], width=own[1])
        model = load_network(YolosForObjectDetection, name)
        index = class_index({i: [text] for i, text in model.config.id2label.items()}, label)
        return cls(
            model, config_dict(model.config), processor_config(processor), {"name": name}, licence,
            class_index=index, score_as=score_as, target=target, edges=edges,
        )  # fmt: skip

    @classmethod
    def network(cls, model_config: dict) -> nn.Module:
        from transformers import YolosConfig, YolosForObjectDetection

        return YolosForObjectDetection(YolosConfig(**model_config))

    def take_apart(self, model: nn.Module) -> None:
        embeddings, encoder = model.vit.embeddings, model.vit.encoder
        self.num_detections = model.config.num_detection_tokens
        position = self._prefix_first(embeddings.interpolation(embeddings.position_embeddings, self.image_size)[0])
        between = [None] * len(encoder.layer)
        if encoder.interpolation is not None:  # one after every layer but the last
            between[:-1] = [self._prefix_first(p[0]) for p in encoder.interpolation(self.image_size)]
        self.keep_tower(
            embeddings.patch_embeddings.projection,
            position,
            [PositionedBlock(layer, p) for layer, p in zip(encoder.layer, between, strict=True)],
            prefix=torch.cat([embeddings.cls_token[0], embeddings.detection_tokens[0]]),
        )
        self.post_norm, self.classifier = model.vit.layernorm, model.class_labels_classifier
        self.pooled_tokens = tuple(range(1, 1 + self.num_detections))

    def _prefix_first(self, tokens: Tensor) -> Tensor:
        """[class, patches, detections] -> [class, detections, patches] along the first axis."""
        return torch.cat([tokens[:1], tokens[-self.num_detections :], tokens[1 : -self.num_detections]])

    def preprocess(self, images: Tensor) -> Tensor:
        found = detector_size(*images.shape[-2:], *self.settings["edges"])
        if found != self.image_size:
            raise ValueError(
                f"images: expected an aspect ratio that the processor brings to {self.image_size}, got "
                f"{tuple(images.shape[-2:])}, which becomes {found}; load the reward with image_size=(H, W) of these"
            )
        return super().preprocess(images)

    def head_parameters(self):
        return tuple(self.classifier.parameters())

    def encode_condition(self, prompts) -> None:
        """None: the score does not depend on a prompt."""
        return None

    def finish(self, tokens: Tensor) -> RewardOutput:
        tokens = self.post_norm(tokens)
        return RewardOutput(tokens, tokens[:, 1 : 1 + self.num_detections].mean(1))

    def probabilities(self, tokens: Tensor) -> Tensor:
        """p_d [B, detections], float32, of the output tokens."""
        logits = self.classifier(tokens[:, 1 : 1 + self.num_detections].to(self.dtype)).float()
        return logits.softmax(-1)[..., self.settings["class_index"]]

    def score(self, output: RewardOutput, condition=None) -> Tensor:
        p = self.probabilities(output.tokens)
        if self.settings["score_as"] == "presence":
            # Π(1 - p) = exp(-absent), kept finite where a probability rounds to 0 or 1.
            absent = -torch.log1p(-p.clamp(max=1 - 1e-6)).sum(-1)
            return torch.log(-torch.expm1(-absent.clamp(min=1e-30)))
        count = p.sum(-1)
        if self.settings["target"] is None:
            return count
        return -F.smooth_l1_loss(count, torch.full_like(count, self.settings["target"]), reduction="none")
