"""Rewards whose image tower is a plain ViT of transformers: how it is cut, and how its folder is read.

A tower is taken apart into what every ViT has: a patch convolution, prefix tokens, positions, blocks. A suffix then
simply lacks the lower parts, and position embeddings stand at the resolution that the preprocessing gives.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import RewardModel
from .preprocessing import check_preprocess_config, preprocess

CLIP_VOCABULARY = 49408
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by PIL's number


class Unmasked(nn.Module):
    """An encoder layer of transformers as a block on tokens alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens, attention_mask=None)


class HFViTReward(RewardModel):
    """A reward cut from a model of transformers. Frozen and in eval mode.

    Subclasses say how the network is built from its configuration (:meth:`network`), which of its parts serve
    (:meth:`take_apart`), and how the last tokens are read (``finish``, ``score``).

    Args:
        model: the network, of the class that :meth:`network` builds or with the same parts.
        model_config: what :meth:`network` needs, JSON-ready.
        preprocess_config: see :func:`.preprocessing.preprocess`; ``size`` is the pixel size that enters the network.
        reference: ``{"name", ...}`` by which ``from_pretrained`` finds it again.
        licence: of the weights; carried into value models made from this reward.
        settings: of the score, by keyword; kept in the description.
    """

    def __init__(
        self,
        model: nn.Module,
        model_config: dict,
        preprocess_config: dict,
        reference: dict | None = None,
        licence: str | None = None,
        **settings,
    ):
        super().__init__()
        check_preprocess_config(preprocess_config)
        self.model_config, self.preprocess_config = model_config, preprocess_config
        self.reference, self.licence, self.settings = reference, licence, settings
        self.image_size = tuple(preprocess_config["size"])
        self.mean, self.std = tuple(preprocess_config["mean"]), tuple(preprocess_config["std"])
        self.take_apart(model)
        self.eval().requires_grad_(False)

    # -- what a subclass says ------------------------------------------------------------------------------------------

    @classmethod
    def network(cls, model_config: dict) -> nn.Module:
        """A network of this configuration with any weights, or on the meta device none."""
        raise NotImplementedError

    def take_apart(self, model: nn.Module) -> None:
        """Keep what serves: call :meth:`keep_tower`, and keep norms, pooling and head."""
        raise NotImplementedError

    # -- written once --------------------------------------------------------------------------------------------------

    def keep_tower(
        self,
        patch: nn.Conv2d,
        position: Tensor,
        blocks: list[nn.Module],
        prefix: Tensor | None = None,
        pre_norm: nn.Module | None = None,
    ) -> None:
        """Args: position [P+N, C] or [N, C] without prefix, at ``image_size``; prefix [P, C]."""
        self.patch, self.pre_norm = patch, pre_norm
        self.grid = tuple(side // step for side, step in zip(self.image_size, patch.stride, strict=True))
        self.num_prefix_tokens = 0 if prefix is None else prefix.shape[0]
        self.width = patch.out_channels
        expected = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        if position.shape[0] != expected:
            raise ValueError(
                f"preprocessing: expected an image size of {position.shape[0] - self.num_prefix_tokens} patches, the "
                f"network's own, got {self.image_size}, which has {expected - self.num_prefix_tokens}"
            )
        self.prefix = None if prefix is None else nn.Parameter(prefix.detach().clone())
        self.position = nn.Parameter(position.detach().clone())
        self.blocks = nn.ModuleList(blocks)

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        return self.patch(pixels.to(self.dtype)).flatten(2).transpose(1, 2)

    def enter(self, patches: Tensor) -> Tensor:
        if self.prefix is not None:
            prefix = self.prefix.to(patches.dtype).expand(patches.shape[0], -1, -1)
            patches = torch.cat([prefix, patches], dim=1)
        tokens = patches + self.position
        return tokens if self.pre_norm is None else self.pre_norm(tokens)

    def preprocess(self, images: Tensor) -> Tensor:
        return preprocess(images, self.preprocess_config)

    def describe(self) -> dict:
        return {
            "class": type(self).__name__,
            "reference": self.reference,
            "licence": self.licence,
            "model": self.model_config,
            "preprocess": self.preprocess_config,
            "settings": self.settings,
        }

    @classmethod
    def suffix_from_config(cls, config: dict, layer: int) -> HFViTReward:
        config = copy.deepcopy(config)
        with torch.device("meta"):
            self = cls(
                cls.network(config["model"]), config["model"], config["preprocess"], config["reference"],
                config["licence"], **config["settings"],
            )  # fmt: skip
        self.check_layer(layer)
        self.patch = None
        if layer > 1:
            self.prefix = self.position = self.pre_norm = None
        for below in range(layer - 1):  # empty places keep the numbering of the blocks
            self.blocks[below] = nn.Identity()
        self.kept_from = layer
        self.to_empty(device="cpu").requires_grad_(True)
        for parameter in self.head_parameters():
            parameter.requires_grad_(False)
        return self


# ------------------------------------------------------------------------------------------------------------- folders


def portable_folder(name: str | Path) -> str:
    """A folder's full path, so that a saved value model finds it from anywhere; a hub's ``owner/model`` as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def load_network(model_class: type, name: str) -> nn.Module:
    """``model_class.from_pretrained`` in float32 and eval mode, every weight from the file.

    Raises:
        OSError: a folder that is missing, unreadable, of another kind of model, or without some of the weights.
    """
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != model_class.config_class.model_type:
            raise ValueError(f"config.json: expected model_type {model_class.config_class.model_type!r}, got {kind!r}")
        model, info = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers, safetensors, json and pickle each raise their own kinds
        raise OSError(f"reward {name!r}: cannot be loaded: {type(error).__name__}: {error}") from error
    if info["missing_keys"]:  # transformers fills these with random numbers
        raise OSError(f"reward {name!r}: {model_class.__name__} has no weights for {sorted(info['missing_keys'])}")
    return model.eval().requires_grad_(False)


def config_dict(config: Any) -> dict:
    """A transformers configuration, JSON-ready."""
    return {k: v for k, v in json.loads(config.to_json_string()).items() if k not in ("transformers_version", "dtype")}


def load_processor(name: str, default: Callable[[], Any]) -> Any:
    """The folder's image processor; ``default()`` if it has no preprocessor_config.json."""
    from transformers import AutoImageProcessor
    from transformers.utils import has_file

    try:
        if not any(has_file(name, file) for file in ("preprocessor_config.json", "processor_config.json")):
            return default()
        return AutoImageProcessor.from_pretrained(name)
    except Exception as error:
        raise OSError(f"reward {name!r}: its image processor cannot be loaded: {error}") from error


def processor_config(processor: Any) -> dict:
    """What a processor of transformers does, as a configuration of :func:`.preprocessing.preprocess`.

    Raises:
        ValueError: it does something that :func:`preprocess` does not.
    """
    size, crop = processor.size, getattr(processor, "crop_size", None)
    resample = processor.resample
    interpolation = _INTERPOLATIONS.get(getattr(resample, "value", resample))
    if not (processor.do_resize and processor.do_rescale) or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise ValueError("preprocessor_config.json: expected do_resize, and do_rescale by 1/255")
    if interpolation is None:
        raise ValueError(f"preprocessor_config.json: expected resample 2 or 3 (bilinear, bicubic), got {resample}")
    if size.height and size.width:
        mode, aim = "squash", [size.height, size.width]
    elif size.shortest_edge and not size.longest_edge:
        mode, aim = "shortest", [size.shortest_edge, size.shortest_edge]
    else:
        raise ValueError(f"preprocessor_config.json: expected size by height and width or by shortest_edge, got {size}")
    cropped = [crop.height, crop.width] if getattr(processor, "do_center_crop", False) else None
    if mode == "shortest" and cropped is None:
        raise ValueError("preprocessor_config.json: expected do_center_crop with a size by shortest_edge")
    normalized = processor.do_normalize
    return {
        "size": cropped or aim,
        "resize_to": aim,
        "resize_mode": mode,
        "interpolation": interpolation,
        "fill_color": 0,
        "crop_floor": True,
        "mean": list(processor.image_mean) if normalized else [0.0] * 3,
        "std": list(processor.image_std) if normalized else [1.0] * 3,
    }


# --------------------------------------------------------------------------------------------------------------- texts


def _hf_tokenize(tokenizer, length: int, texts: list[str]) -> dict[str, Tensor]:
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}


def _clip_tokenize(tokenizer, texts: list[str]) -> dict[str, Tensor]:
    return {"input_ids": tokenizer(texts)}


def load_tokenize(name: str, length: int, vocabulary: int) -> Callable[[list[str]], dict[str, Tensor]]:
    """From texts to a text tower's inputs, padded to ``length`` (SigLIP was trained so; to CLIP it makes no odds).

    A folder without tokenizer files whose vocabulary has CLIP's size gets CLIP's tokenizer, of which there is one.

    Raises:
        OSError: no tokenizer.
    """
    from transformers import AutoTokenizer
    from transformers.utils import has_file

    try:
        if any(has_file(name, file) for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
            return partial(_hf_tokenize, AutoTokenizer.from_pretrained(name), length)
    except Exception as error:
        raise OSError(f"tokenizer {name!r}: cannot be loaded: {error}") from error
    if vocabulary == CLIP_VOCABULARY:
        from open_clip.tokenizer import SimpleTokenizer

        return partial(_clip_tokenize, SimpleTokenizer(context_length=length))
    raise OSError(f"tokenizer {name!r}: expected tokenizer.json (or vocab.json and merges.txt), found none")


class HFTexts(nn.Module):
    """A text tower of transformers: from a list of strings to embeddings [B, D].

    Args:
        model: whose output has the pooled text as ``pooler_output``.
        projection: of the pooled text; None where the model's own output is projected.
        tokenize: see :func:`load_tokenize`.
    """

    def __init__(self, model: nn.Module, projection: nn.Module | None, tokenize: Callable):
        super().__init__()
        self.model, self.projection, self.tokenize = model, projection, tokenize

    def forward(self, texts: list[str]) -> Tensor:
        device = next(self.parameters()).device
        pooled = self.model(**{name: t.to(device) for name, t in self.tokenize(texts).items()}).pooler_output
        return pooled if self.projection is None else self.projection(pooled)
