"""Image classifiers as rewards, a class's logit or log-probability; DINOv2 of transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .base import RewardModel, RewardOutput, check_score_as
from .hf_vit import HFViTReward, config_dict, load_network, load_processor, portable_folder, processor_config

SCORES = ("logit", "log_probability")


def class_index(names: Mapping[int, list[str]], label: int | str) -> int:
    """The class that a label means: its number, or one of its names in any case.

    Where a name lists synonyms ("tabby, tabby cat"), each of them will do if no other class has it.

    Raises:
        ValueError: no such class, or several.
    """
    if isinstance(label, int):
        if label not in names:
            raise ValueError(f"label: expected a class in 0..{max(names)}, got {label}")
        return label
    wanted = label.casefold()
    for spell in (lambda name: [name], lambda name: name.split(", ")):
        found = [i for i, given in names.items() if wanted in (s.casefold() for name in given for s in spell(name))]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"label: expected the name of one class, got {label!r}, which is of the classes {found}")
    some = [given[0] for given in list(names.values())[:5] if given]
    raise ValueError(f"label: expected a class number or a name such as {some}, got {label!r}")


class ClassScore(RewardModel):
    """The score of a class. It needs no prompt, and reads the tokens: an embedding is kept normalised (METHOD.md §4),
    and a classifier reads its length too. The classifier stays frozen in suffixes.
    """

    distillation = "score"
    class_index: int
    score_as: str

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Class logits [B, K] of the output tokens."""

    def encode_condition(self, prompts) -> None:
        """None: the score does not depend on a prompt."""
        return None

    def score(self, output: RewardOutput, condition=None) -> Tensor:
        logits = self.logits(output.tokens.to(self.dtype)).float()
        if self.score_as == "log_probability":
            logits = logits.log_softmax(-1)
        return logits[:, self.class_index]


class Dinov2Reward(ClassScore, HFViTReward):
    """A class of a ``Dinov2ForImageClassification`` of transformers: its linear layer reads the class token and the
    mean patch.

    Settings:
        class_index: the class.
        score_as: "logit" (default), about -5 to 20; or "log_probability", at most 0.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_score_as(self.settings["score_as"], SCORES)
        self.class_index, self.score_as = self.settings["class_index"], self.settings["score_as"]

    @classmethod
    def from_pretrained(
        cls, name: str | Path, label: int | str, licence: str | None = None, score_as: str = "logit"
    ) -> Dinov2Reward:
        """Load by transformers' own functions.

        Args:
            name: a folder of ``Dinov2ForImageClassification`` (config.json, model.safetensors or pytorch_model.bin;
                preprocessor_config.json, without which it is DINOv2's own: 256, cropped to 224), or "owner/model".
            label: the class, by number or by a name of config.json's ``id2label``.

        Raises:
            OSError: a folder or file that is missing or cannot be read, or a model without a classifier.
            ValueError: an unknown label or ``score_as``; a preprocessing that is not supported.
        """
        from transformers import BitImageProcessor, Dinov2ForImageClassification
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        check_score_as(score_as, SCORES)
        name = portable_folder(name)
        model = load_network(Dinov2ForImageClassification, name)
        index = class_index({i: [text] for i, text in model.config.id2label.items()}, label)
        processor = load_processor(
            name,
            lambda: BitImageProcessor(
                size={"shortest_edge": 256}, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
            ),
        )
        return cls(
            model, config_dict(model.config), processor_config(processor), {"name": name}, licence,
            class_index=index, score_as=score_as,
        )  # fmt: skip

    @classmethod
    def network(cls, model_config: dict) -> nn.Module:
        from transformers import Dinov2Config, Dinov2ForImageClassification

        return Dinov2ForImageClassification(Dinov2Config(**model_config))

    def take_apart(self, model: nn.Module) -> None:
        embeddings = model.dinov2.embeddings
        patch = embeddings.patch_embeddings.projection
        height, width = self.image_size
        patches = (height // patch.stride[0]) * (width // patch.stride[1])
        tokens = embeddings.cls_token.new_empty(1, 1 + patches, patch.out_channels)
        self.keep_tower(
            patch,
            embeddings.interpolate_pos_encoding(tokens, height, width)[0],
            list(model.dinov2.encoder.layer),
            prefix=embeddings.cls_token[0],
        )
        self.post_norm, self.classifier = model.dinov2.layernorm, model.classifier

    def head_parameters(self):
        return tuple(self.classifier.parameters())

    @staticmethod
    def _pool(tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1)

    def finish(self, tokens: Tensor) -> RewardOutput:
        tokens = self.post_norm(tokens)
        return RewardOutput(tokens, self._pool(tokens))

    def logits(self, tokens: Tensor) -> Tensor:
        return self.classifier(self._pool(tokens))
