"""CLIP rewards from open_clip, and scalar heads on CLIP embeddings (the LAION aesthetic predictor).

Only the image tower is a registered part of these modules; the text tower is :mod:`.text`'s.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .base import RewardOutput
from .open_clip_loading import OpenClipTexts, load_open_clip, load_open_clip_texts, open_clip_name, portable_reference
from .preprocessing import check_preprocess_config, preprocess
from .scalar_head import ScalarHead
from .text import TextConditioned, TextEncoder


def _drop_below(visual: nn.Module, layer: int) -> None:
    """Remove what the suffix from block ``layer`` does not use; empty places keep the numbering of the blocks."""
    visual.conv1 = None
    if layer > 1:
        visual.class_embedding = visual.positional_embedding = visual.ln_pre = None
    for below in range(layer - 1):
        visual.transformer.resblocks[below] = nn.Identity()


def _text_encoder(reference: dict | None, tower: nn.Module | None = None) -> TextEncoder:
    return TextEncoder(None if reference is None else partial(load_open_clip_texts, **reference), tower)


class OpenClipReward(TextConditioned):
    """Cosine of the image's and the prompt's embeddings, by an open_clip model whose image tower is a ViT.

    The score is the plain cosine without logit scale, in [-1, 1]: about 0.2 to 0.35 for OpenAI's and LAION's models on
    matching pairs, 0.4 for DFN's (multiply by 100 to compare with most published tables). Frozen and in eval mode.

    Output tokens are the sequence that pooling reads: all 1+N tokens after ``ln_post``, or the last block's where the
    tower normalises after pooling or pools by attention.

    Args:
        clip: an open_clip model whose ``visual`` is a VisionTransformer.
        tokenizer: callable from a list of strings to ids [B, L], as ``open_clip.get_tokenizer`` returns.
        model_config: open_clip's ``model_cfg``, from which ``clip`` was built.
        preprocess_config: what differs from the model's own ``preprocess_cfg``, see :func:`.preprocessing.preprocess`.
        reference: ``{"name", "pretrained"}`` by which :meth:`from_pretrained` finds it again, if it can.
        licence: of the weights; carried into value models made from this reward.

    Raises:
        TypeError: another kind of image tower.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer,
        model_config: dict,
        reference: dict | None = None,
        licence: str | None = None,
        preprocess_config: dict | None = None,
    ):
        from open_clip.transform import PreprocessCfg, merge_preprocess_dict
        from open_clip.transformer import VisionTransformer

        super().__init__()
        if not isinstance(clip.visual, VisionTransformer):
            raise TypeError(
                f"clip: expected an image tower of class VisionTransformer, got {type(clip.visual).__name__}"
            )
        clip.eval().requires_grad_(False)
        given = getattr(clip.visual, "preprocess_cfg", {"size": clip.visual.image_size})
        given = merge_preprocess_dict(asdict(PreprocessCfg()), given)
        self._set_up(clip.visual, {**given, **(preprocess_config or {})})
        self.model_config = {
            "embed_dim": model_config["embed_dim"],
            "vision_cfg": copy.deepcopy(model_config["vision_cfg"]),
            "quick_gelu": model_config.get("quick_gelu", False),
        }
        self.reference, self.licence = reference, licence
        self.text = _text_encoder(reference, OpenClipTexts(clip, tokenizer))
        self.eval()

    def _set_up(self, visual: nn.Module, preprocess_config: dict) -> None:
        self.visual = visual
        self.preprocess_config = preprocess_config
        check_preprocess_config(preprocess_config)
        self.width = visual.conv1.out_channels
        self.grid = tuple(visual.grid_size)
        self.num_prefix_tokens = 1
        self.pooled_tokens = (0,) if visual.attn_pool is None and visual.pool_type == "tok" else None
        self.image_size = tuple(visual.image_size)
        self.mean, self.std = tuple(preprocess_config["mean"]), tuple(preprocess_config["std"])

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        pretrained: str | Path | None = None,
        licence: str | None = None,
        preprocess_config: dict | None = None,
    ) -> OpenClipReward:
        """Load by open_clip's own functions.

        Args:
            name: a folder in open_clip's format (open_clip_config.json; open_clip_model.safetensors or
                open_clip_pytorch_model.bin, tokenizer files where the configuration names an ``hf_tokenizer_name``); or
                "hf-hub:owner/model"; or "local-dir:folder"; or "playground:reward"; or an open_clip model name.
            pretrained: with a model name, the tag or weights file (its tensors at the top, or under ``state_dict``).
            licence, preprocess_config: as for the class.

        Raises:
            ValueError: an unknown name or tag, or weights trained with QuickGELU for a model without it.
            OSError: a missing or unreadable folder or file.
        """
        reference = portable_reference(name, pretrained)
        return cls(*load_open_clip(**reference), reference, licence, preprocess_config)

    # -- the cut -------------------------------------------------------------------------------------------------------

    @property
    def embed_dim(self) -> int:
        return self.model_config["embed_dim"]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.visual.transformer.resblocks

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        return self.visual.conv1(pixels.to(self.dtype)).flatten(2).transpose(1, 2)

    def enter(self, patches: Tensor) -> Tensor:
        prefix = self.visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        tokens = torch.cat([prefix, patches], dim=1) + self.visual.positional_embedding.to(patches.dtype)
        return self.visual.ln_pre(tokens)

    def finish(self, tokens: Tensor) -> RewardOutput:
        visual = self.visual
        if visual.attn_pool is None and not visual.final_ln_after_pool:
            tokens = visual.ln_post(tokens)
            pooled, _ = visual._global_pool(tokens)
        else:
            pooled, _ = visual._pool(tokens)
        return RewardOutput(tokens, pooled @ visual.proj if visual.proj is not None else pooled)

    # -- the score -----------------------------------------------------------------------------------------------------

    def preprocess(self, images: Tensor) -> Tensor:
        return preprocess(images, self.preprocess_config)

    def score(self, output: RewardOutput, condition: Tensor | None) -> Tensor:
        return self.cosine(output, condition)

    # -- saved value models --------------------------------------------------------------------------------------------

    def describe(self) -> dict:
        return {
            "class": type(self).__name__,
            "reference": self.reference,
            "licence": self.licence,
            "model": self.model_config,
            "preprocess": {k: list(v) if isinstance(v, tuple) else v for k, v in self.preprocess_config.items()},
        }

    @classmethod
    def suffix_from_config(cls, config: dict, layer: int) -> OpenClipReward:
        from open_clip.model import _build_vision_tower

        self = cls.__new__(cls)
        nn.Module.__init__(self)
        with torch.device("meta"):
            visual = _build_vision_tower(**copy.deepcopy(config["model"]))
        self._set_up(visual, copy.deepcopy(config["preprocess"]))
        self.model_config = copy.deepcopy(config["model"])
        self.reference, self.licence = config["reference"], config["licence"]
        self.text = _text_encoder(self.reference)
        self.check_layer(layer)
        _drop_below(visual, layer)
        self.kept_from = layer
        return self.to_empty(device="cpu").eval()


class AestheticReward(OpenClipReward):
    """A scalar head on the normalised image embedding, like the LAION aesthetic predictor. Needs no prompt.

    About 4.5 to 6.5 with LAION's weights on natural images; about zero mean and unit variance in the playground. The
    head stays frozen in suffixes too (METHOD.md §4); one without activations is an affine map, and is kept as such: a
    vector and a bias (:meth:`ScalarHead.folded`).
    """

    distillation = "score"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer,
        model_config: dict,
        head: ScalarHead,
        reference: dict | None = None,
        licence: str | None = None,
    ):
        super().__init__(clip, tokenizer, model_config, reference, licence)
        first = head.sizes[min(head.sizes)]
        if first[1] != model_config["embed_dim"]:
            raise ValueError(f"head: expected one on embeddings of width {model_config['embed_dim']}, got {first[1]}")
        self.head = head.folded().eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        pretrained: str | None = None,
        licence: str | None = None,
        head: str | Path | None = None,
        activation: str | None = None,
    ) -> AestheticReward:
        """As :meth:`OpenClipReward.from_pretrained`.

        Args:
            head: the head's file, see :meth:`ScalarHead.from_file`; default ``aesthetic_head.safetensors`` in the
                folder.
        """
        reference = portable_reference(name, pretrained)
        if head is None:
            full = open_clip_name(reference["name"])
            if not full.startswith("local-dir:"):
                raise ValueError(f"head: expected the file of the scalar head that goes with {name!r}, got None")
            head = Path(full.removeprefix("local-dir:")) / "aesthetic_head.safetensors"
        scalar = ScalarHead.from_file(head, activation)
        return cls(*load_open_clip(**reference), scalar, reference, licence)

    def head_parameters(self):
        return tuple(self.head.parameters())

    def encode_condition(self, prompts) -> None:
        """None: the score does not depend on a prompt."""
        return None

    def score(self, output: RewardOutput, condition=None) -> Tensor:
        return self.head(output.normalized.to(self.dtype)).float()

    def describe(self) -> dict:
        sizes = {str(index): list(size) for index, size in self.head.sizes.items()}
        return {**super().describe(), "head": {"sizes": sizes, "activation": self.head.activation}}

    @classmethod
    def suffix_from_config(cls, config: dict, layer: int) -> AestheticReward:
        self = super().suffix_from_config(config, layer)
        sizes = {int(index): tuple(size) for index, size in config["head"]["sizes"].items()}
        self.head = ScalarHead(sizes, config["head"]["activation"]).eval().requires_grad_(False)
        return self
