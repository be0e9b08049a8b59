"""The ViT classifiers of timm as rewards."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from .base import RewardOutput, check_score_as
from .classifier import SCORES, ClassScore, class_index
from .preprocessing import check_preprocess_config, preprocess


def _timm_source(name: str) -> str:
    """How timm calls it: folders become ``local-dir:``."""
    folder = Path(name.removeprefix("local-dir:"))
    if not (name.startswith("local-dir:") or folder.is_absolute() or folder.is_dir()):
        return name
    if not (folder / "config.json").is_file():
        raise OSError(f"reward folder {folder}: expected config.json and model.safetensors, as timm writes them")
    return f"local-dir:{folder.resolve()}"


def _timm_names(cfg: dict, count: int) -> dict[int, list[str]]:
    """Names of the classes: those that came with the weights, else ImageNet's, where the number of classes is one of
    ImageNet's.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names, descriptions = cfg.get("label_names"), cfg.get("label_descriptions") or {}
    if names:
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        found = {int(i): [str(name), *filter(None, [descriptions.get(name)])] for i, name in pairs}
        return {i: found.get(i, []) for i in range(count)}
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return {i: [] for i in range(count)}
    info = ImageNetInfo(subset)
    return {i: [info.index_to_description(i), info.index_to_label_name(i)] for i in range(count)}


def _timm_preprocess(model: nn.Module) -> dict:
    """What timm's evaluation transform does, as a configuration of :func:`.preprocessing.preprocess`."""
    from timm.data import resolve_model_data_config

    data = resolve_model_data_config(model)
    size = list(data["input_size"][1:])
    if data["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"pretrained_cfg: expected crop_mode 'center' or 'squash', got {data['crop_mode']!r}")
    return {
        "size": size,
        "resize_to": [math.floor(side / data["crop_pct"]) for side in size],
        "resize_mode": "squash" if data["crop_mode"] == "squash" else "shortest",
        "interpolation": data["interpolation"],
        "fill_color": 0,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
    }


def _check_vit(vit: nn.Module) -> None:
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(vit, VisionTransformer):
        raise TypeError(f"vit: expected timm's VisionTransformer, got {type(vit).__name__}")
    if not vit.num_classes:
        raise ValueError("vit: expected a network with a classifier, got one with 0 classes")


class TimmReward(ClassScore):
    """A class of a timm ``VisionTransformer`` with a classifier, with whatever prefix tokens it has: class token,
    registers, both or none. Frozen and in eval mode.

    The score is the class's logit (default), about -5 to 20, or its log-probability, at most 0.

    Args:
        vit: the network.
        model_config: ``{"architecture", "args"}`` by which ``timm.create_model`` builds it again.
        preprocess_config: see :func:`.preprocessing.preprocess`.
        class_index: the class.

    Raises:
        TypeError: another kind of network.
        ValueError: one without classifier, or for another image size.
    """

    def __init__(
        self,
        vit: nn.Module,
        model_config: dict,
        preprocess_config: dict,
        class_index: int,
        score_as: str = "logit",
        reference: dict | None = None,
        licence: str | None = None,
    ):
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        _check_vit(vit)
        check_score_as(score_as, SCORES)
        check_preprocess_config(preprocess_config)
        self.image_size = tuple(preprocess_config["size"])
        if tuple(vit.patch_embed.img_size) != self.image_size:
            raise ValueError(
                f"vit: expected one for images of {self.image_size}, as its preprocessing makes them, got "
                f"{tuple(vit.patch_embed.img_size)}"
            )
        vit.dynamic_img_size = False  # the grid is fixed here; _pos_embed then takes patches as [B, N, C]
        self.vit = vit.eval().requires_grad_(False)
        self.model_config, self.preprocess_config = model_config, preprocess_config
        self.class_index, self.score_as = class_index, score_as
        self.reference, self.licence = reference, licence
        self.width, self.grid = vit.embed_dim, tuple(vit.patch_embed.grid_size)
        self.num_prefix_tokens = vit.num_prefix_tokens
        # A subclass (DeiT's distilled ViT) may pool otherwise.
        self.pooled_tokens = (0,) if type(vit) is VisionTransformer and vit.global_pool == "token" else None
        self.mean, self.std = tuple(preprocess_config["mean"]), tuple(preprocess_config["std"])
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        label: int | str,
        pretrained: str | Path | None = None,
        licence: str | None = None,
        score_as: str = "logit",
        **model_args,
    ) -> TimmReward:
        """Load by ``timm.create_model``.

        Args:
            name: a folder in timm's format (config.json, model.safetensors or pytorch_model.bin), "hf-hub:owner/model",
                or a model name, with tag or without.
            label: the class, by number or name; names are the file's, else ImageNet's.
            pretrained: with a model name, a weights file instead of the tag's.
            licence: by default what timm's configuration says.
            model_args: of ``timm.create_model``, JSON-ready, such as ``num_classes``.

        Raises:
            OSError: a folder or file that is missing or cannot be read.
            ValueError, TypeError: an unknown label; a network or preprocessing that is not supported.
        """
        import timm

        check_score_as(score_as, SCORES)
        source = _timm_source(str(name))
        if pretrained is not None and not Path(pretrained).is_file():
            raise OSError(f"pretrained: expected an existing weights file, got {pretrained}")
        try:
            vit = timm.create_model(
                source, pretrained=pretrained is None, checkpoint_path=pretrained or "", **model_args
            )
            if source.startswith("local-dir:"):
                saved = json.loads((Path(source.removeprefix("local-dir:")) / "config.json").read_text())
                model_args = {**saved.get("model_args", {}), **model_args}
            elif source.startswith("hf-hub:"):
                _, _, saved = timm.models.load_model_config_from_hf(source.removeprefix("hf-hub:"))
                model_args = {**(saved or {}), **model_args}
        except Exception as error:  # timm, safetensors, pickle and json each raise their own kinds
            raise OSError(f"reward {name!r}: cannot be loaded: {type(error).__name__}: {error}") from error
        _check_vit(vit)
        img_size = list(vit.patch_embed.img_size)
        model_args = {k: v for k, v in model_args.items() if not k.startswith("pretrained_cfg")}  # of loading only
        model_args |= {"num_classes": vit.num_classes, "global_pool": vit.global_pool, "img_size": img_size}
        cfg = dict(vit.pretrained_cfg)
        reference = {"name": source, "pretrained": None if pretrained is None else str(Path(pretrained).resolve())}
        return cls(
            vit,
            {"architecture": cfg["architecture"], "args": model_args},
            _timm_preprocess(vit),
            class_index(_timm_names(cfg, vit.num_classes), label),
            score_as,
            reference,
            licence or cfg.get("license"),
        )

    @property
    def blocks(self) -> nn.Sequential:
        return self.vit.blocks

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        patches = self.vit.patch_embed(pixels.to(self.dtype))
        return patches.flatten(1, 2) if patches.ndim == 4 else patches

    def enter(self, patches: Tensor) -> Tensor:
        return self.vit.norm_pre(self.vit._pos_embed(patches))

    def finish(self, tokens: Tensor) -> RewardOutput:
        tokens = self.vit.norm(tokens)
        return RewardOutput(tokens, self.vit.forward_head(tokens, pre_logits=True))

    def logits(self, tokens: Tensor) -> Tensor:
        return self.vit.forward_head(tokens)

    def head_parameters(self):
        heads = self.vit.get_classifier()
        heads = heads if isinstance(heads, tuple) else (heads,)
        return tuple(p for head in heads for p in head.parameters())

    def preprocess(self, images: Tensor) -> Tensor:
        return preprocess(images, self.preprocess_config)

    def describe(self) -> dict:
        return {
            "class": type(self).__name__,
            "reference": self.reference,
            "licence": self.licence,
            "model": self.model_config,
            "preprocess": self.preprocess_config,
            "class_index": self.class_index,
            "score_as": self.score_as,
        }

    @classmethod
    def suffix_from_config(cls, config: dict, layer: int) -> TimmReward:
        import timm

        config = copy.deepcopy(config)
        with torch.device("meta"):
            vit = timm.create_model(config["model"]["architecture"], pretrained=False, **config["model"]["args"])
        self = cls(
            vit, config["model"], config["preprocess"], config["class_index"], config["score_as"],
            config["reference"], config["licence"],
        )  # fmt: skip
        self.check_layer(layer)
        vit.patch_embed = None
        if layer > 1:
            vit.cls_token = vit.reg_token = vit.pos_embed = None
            vit.norm_pre = nn.Identity()
        for below in range(layer - 1):  # empty places keep the numbering of the blocks
            vit.blocks[below] = nn.Identity()
        self.kept_from = layer
        self.to_empty(device="cpu").requires_grad_(True)
        for parameter in self.head_parameters():
            parameter.requires_grad_(False)
        return self
