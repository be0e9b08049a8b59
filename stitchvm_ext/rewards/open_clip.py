"""CLIP rewards from open_clip, and scalar heads on CLIP embeddings (the LAION aesthetic predictor).

Only the image tower is a registered part of these modules. The text tower belongs to a plain object,
:class:`TextEncoder`, that a full reward and its suffixes share: it is never trained, never saved, and read from the
original reward when first needed.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import RewardModel, RewardOutput
from .open_clip_loading import TextEncoder, load_open_clip, open_clip_name, portable_name
from .preprocessing import INTERPOLATIONS, RESIZE_MODES, preprocess
from .scalar_head import ScalarHead


def _drop_below(visual: nn.Module, layer: int) -> None:
    """Remove what the suffix from block ``layer`` does not use; empty places keep the numbering of the blocks."""
    visual.conv1 = None
    if layer > 1:
        visual.class_embedding = visual.positional_embedding = visual.ln_pre = None
    for below in range(layer - 1):
        visual.transformer.resblocks[below] = nn.Identity()


class OpenClipReward(RewardModel):
    """Cosine of the image's and the prompt's embeddings, by an open_clip model whose image tower is a ViT.

    The score is the plain cosine without logit scale, in [-1, 1]: about 0.2 to 0.35 for OpenAI's and LAION's models on
    matching pairs, 0.4 for DFN's (multiply by 100 to compare with most published tables). Frozen and in eval mode.

    Output tokens are the sequence that pooling reads: all 1+N tokens after ``ln_post``, or the last block's where the
    tower normalises after pooling or pools by attention.

    Args:
        clip: an open_clip model whose ``visual`` is a VisionTransformer.
        tokenizer: callable from a list of strings to ids [B, L], as ``open_clip.get_tokenizer`` returns.
        model_config: open_clip's ``model_cfg``, from which ``clip`` was built.
        reference: ``{"name", "pretrained"}`` by which :meth:`from_pretrained` finds it again, if it can.
        licence: of the weights; carried into value models made from this reward.

    Raises:
        TypeError: another kind of image tower.
    """

    def __init__(
        self, clip: nn.Module, tokenizer, model_config: dict, reference: dict | None = None, licence: str | None = None
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
        self._set_up(clip.visual, merge_preprocess_dict(asdict(PreprocessCfg()), given))
        self.model_config = {
            "embed_dim": model_config["embed_dim"],
            "vision_cfg": copy.deepcopy(model_config["vision_cfg"]),
            "quick_gelu": model_config.get("quick_gelu", False),
        }
        self.reference, self.licence = reference, licence
        self.text = TextEncoder(reference, clip, tokenizer)
        self.eval()

    def _set_up(self, visual: nn.Module, preprocess_config: dict) -> None:
        self.visual = visual
        self.preprocess_config = preprocess_config
        for key, known in (("resize_mode", RESIZE_MODES), ("interpolation", INTERPOLATIONS)):
            if preprocess_config[key] not in known:
                raise ValueError(f"preprocess_cfg[{key!r}]: expected one of {known}, got {preprocess_config[key]!r}")
        self.width = visual.conv1.out_channels
        self.grid = tuple(visual.grid_size)
        self.num_prefix_tokens = 1
        self.pooled_tokens = (0,) if visual.attn_pool is None and visual.pool_type == "tok" else None
        self.image_size = tuple(visual.image_size)
        self.mean, self.std = tuple(preprocess_config["mean"]), tuple(preprocess_config["std"])

    @classmethod
    def from_pretrained(
        cls, name: str | Path, pretrained: str | None = None, licence: str | None = None
    ) -> OpenClipReward:
        """Load by open_clip's own functions.

        Args:
            name: a folder in open_clip's format (open_clip_config.json; open_clip_model.safetensors or
                open_clip_pytorch_model.bin, tokenizer files where the configuration names an ``hf_tokenizer_name``); or
                "hf-hub:owner/model"; or "local-dir:folder"; or "playground:reward"; or an open_clip model name.
            pretrained: with a model name, the tag or weights file.

        Raises:
            ValueError: an unknown name or tag, or weights trained with QuickGELU for a model without it.
            OSError: a missing or unreadable folder or file.
        """
        name = portable_name(name)
        clip, tokenizer, model_config = load_open_clip(name, pretrained)
        return cls(clip, tokenizer, model_config, {"name": name, "pretrained": pretrained}, licence)

    # -- the cut -------------------------------------------------------------------------------------------------------

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

    def encode_condition(self, prompts: list[str] | tuple[str, ...] | Tensor) -> Tensor:
        """Normalised text embeddings, float32 [B, D], of prompts; or of text embeddings [B, D] computed elsewhere.

        Raises:
            ValueError: prompts for a suffix whose original reward is not known; embeddings of another width.
            OSError: the original reward, needed for its text tower, cannot be loaded.
        """
        if not isinstance(prompts, Tensor):
            return self.text(prompts, self.device)
        width = self.model_config["embed_dim"]
        if prompts.ndim != 2 or prompts.shape[1] != width:
            raise ValueError(
                f"prompts: expected strings or text embeddings [B, {width}], got shape {list(prompts.shape)}"
            )
        return F.normalize(prompts.to(self.device, torch.float32), dim=-1)

    def score(self, output: RewardOutput, condition: Tensor | None) -> Tensor:
        if condition is None:
            raise ValueError("prompts: this reward compares images with texts; expected one prompt per image, got None")
        image = output.normalized
        if condition.shape != image.shape:
            raise ValueError(f"condition: expected text embeddings {list(image.shape)}, got {list(condition.shape)}")
        return (image * condition).sum(-1)

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
        self.text = TextEncoder(self.reference)
        self.check_layer(layer)
        _drop_below(visual, layer)
        self.kept_from = layer
        return self.to_empty(device="cpu").eval()

    def suffix(self, layer: int) -> OpenClipReward:
        suffix = super().suffix(layer)
        suffix.text = self.text
        return suffix


class AestheticReward(OpenClipReward):
    """A scalar head on the normalised image embedding, like the LAION aesthetic predictor. Needs no prompt.

    About 4.5 to 6.5 with LAION's weights on natural images; about zero mean and unit variance in the playground. The
    head stays frozen in suffixes too (METHOD.md §4).
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
        self.head = head.eval().requires_grad_(False)

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
        name = portable_name(name)
        if head is None:
            full = open_clip_name(name)
            if not full.startswith("local-dir:"):
                raise ValueError(f"head: expected the file of the scalar head that goes with {name!r}, got None")
            head = Path(full.removeprefix("local-dir:")) / "aesthetic_head.safetensors"
        scalar = ScalarHead.from_file(head, activation)
        clip, tokenizer, model_config = load_open_clip(name, pretrained)
        return cls(clip, tokenizer, model_config, scalar, {"name": name, "pretrained": pretrained}, licence)

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
