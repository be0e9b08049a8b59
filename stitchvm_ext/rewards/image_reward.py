"""ImageReward v1.0: a BLIP whose text encoder reads the prompt while it looks at the image's tokens.

The image tower is a registered part of the reward. The text encoder, its tokenizer and the scalar head belong to
:class:`CrossEncoder`, a plain object that a full reward and its suffixes share: they are never trained, never saved,
and read from the original files when first needed.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from .base import RewardModel, RewardOutput
from .preprocessing import preprocess

WEIGHTS, TEXT_CONFIG, VOCABULARY = "ImageReward.pt", "med_config.json", "vocab.txt"
MAX_TOKENS = 35
HEAD_LAYERS = (0, 2, 4, 6, 7)  # the places between are dropouts
HEAD_WIDTH = 64  # of both of BLIP's image towers, base and large; no file records it
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072  # of raw scores on ImageReward's own data
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*position_ids$")  # BLIP's contrastive head, and old buffers

# transformers' names of the image tower's parts, and BLIP's own (those of timm)
VISION_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "post_layernorm": "norm",
}


def original_vision_key(name: str) -> str:
    """The checkpoint's key of a weight of ``BlipVisionModel``."""
    for ours, theirs in VISION_NAMES.items():
        name = name.replace(ours, theirs)
    return f"blip.visual_encoder.{name}"


def _vision_config(state: dict[str, Tensor]) -> dict:
    """Keyword arguments of ``BlipVisionConfig``, from the shapes of the weights."""
    prefix = "blip.visual_encoder."
    try:
        width = state[prefix + "cls_token"].shape[-1]
        patch = state[prefix + "patch_embed.proj.weight"].shape[-1]
        side = math.isqrt(state[prefix + "pos_embed"].shape[1] - 1)
        inner = state[prefix + "blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{WEIGHTS}: expected a BLIP image tower with the key {error}, and it has none") from error
    if width % HEAD_WIDTH:
        raise ValueError(f"{WEIGHTS}: expected an image tower with heads of {HEAD_WIDTH}, got width {width}")
    numbers = [re.match(re.escape(prefix) + r"blocks\.(\d+)\.", key) for key in state]
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1 + max(int(n[1]) for n in numbers if n),
        "num_attention_heads": width // HEAD_WIDTH,
        "image_size": side * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }


def _build_vision(config: dict) -> nn.Module:
    from transformers import BlipVisionConfig, BlipVisionModel

    with torch.device("meta"):
        return BlipVisionModel(BlipVisionConfig(**config))


def _build_text(config: dict, image_width: int) -> nn.Module:
    """BLIP's text encoder; the file's ``encoder_width`` is that of another image tower and not read."""
    from transformers import BlipTextConfig, BlipTextModel

    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    missing = [name for name in names if name not in config]
    if missing:
        raise ValueError(f"{TEXT_CONFIG}: expected the settings of a BERT, and it lacks {missing}")
    settings = {name: config[name] for name in names}
    # is_decoder: with cross-attention. Attention itself stays bidirectional, see CrossEncoder. Its module adds the mask
    # to the logits, which suits the eager kind of mask alone.
    text = BlipTextConfig(**settings, encoder_hidden_size=image_width, is_decoder=True, attn_implementation="eager")
    return BlipTextModel(text, add_pooling_layer=False)


def fold_affine(layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A chain of linear layers (weight, bias) with nothing between them as one, float64: weight [out, in], bias [out].

    ImageReward's head is five of them with dropouts between, which do nothing when scoring.
    """
    weight, bias = layers[0][0].double(), layers[0][1].double()
    for w, b in layers[1:]:
        weight, bias = w.double() @ weight, w.double() @ bias + b.double()
    return weight, bias


def _load_tokenizer(source: Path, vocabulary: int):
    """bert-base-uncased from a folder or its vocab.txt, with BLIP's two marks [DEC] and [ENC]."""
    from transformers import BertTokenizer

    folder = source.parent if source.name == VOCABULARY else source
    if not (folder / VOCABULARY).is_file():
        raise OSError(f"tokenizer: expected a folder with bert-base-uncased's {VOCABULARY}, or that file, got {source}")
    tokenizer = BertTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"tokenizer: expected {vocabulary - 2} entries in {folder / VOCABULARY}, as the text encoder has without "
            f"[DEC] and [ENC], got {len(tokenizer) - 2}"
        )
    return tokenizer


def read_image_reward(folder: str | Path, tokenizer: str | Path | None = None):
    """The files of ImageReward v1.0 as an image tower, its configuration, and a :class:`CrossEncoder`'s parts.

    Returns:
        ``BlipVisionModel``; its configuration; ``BlipTextModel``; tokenizer; the head's weight [1, D] and bias [1],
        float64, ending in normalised scores.
    """
    folder = Path(folder)
    try:
        state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
        text_config = json.loads((folder / TEXT_CONFIG).read_text())
    except Exception as error:  # pickle, zip and json each raise their own kinds
        raise OSError(f"folder {folder}: expected {WEIGHTS} and {TEXT_CONFIG}, got: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{WEIGHTS}: expected a dict of tensors, got {type(state).__name__} of other things")
    state = {key: t for key, t in state.items() if not UNUSED.match(key)}
    config = _vision_config(state)
    vision, text = _build_vision(config), _build_text(text_config, config["hidden_size"])
    keys = {
        "vision": {original_vision_key(name): name for name in vision.state_dict()},
        "text": {f"blip.text_encoder.{name}": name for name in text.state_dict()},
        "head": {f"mlp.layers.{n}.{part}": (n, part) for n in HEAD_LAYERS for part in ("weight", "bias")},
    }
    expected = set().union(*keys.values())
    missing, unknown = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or unknown:
        raise ValueError(
            f"{WEIGHTS}: expected the keys of ImageReward v1.0; missing {missing[:5]} ({len(missing)} in all), "
            f"unknown {unknown[:5]} ({len(unknown)} in all)"
        )
    try:
        vision.load_state_dict({keys["vision"][key]: state[key].float() for key in keys["vision"]}, assign=True)
        text.load_state_dict({keys["text"][key]: state[key].float() for key in keys["text"]})
        weight, bias = fold_affine(
            [tuple(state[f"mlp.layers.{n}.{p}"] for p in ("weight", "bias")) for n in (0, 2, 4, 6, 7)]
        )
    except RuntimeError as error:
        raise ValueError(f"{WEIGHTS}: weights of shapes that {TEXT_CONFIG} does not fit: {error}") from error
    words = _load_tokenizer(Path(tokenizer or folder), text.config.vocab_size)
    text.eval().requires_grad_(False)
    return vision, config, text, words, weight / SCORE_STD, (bias - SCORE_MEAN) / SCORE_STD


class CrossEncoder:
    """From image tokens and a prompt to a score: the text encoder with cross-attention, then the folded head.

    Args:
        reference: ``{"name", "tokenizer"}``, the files to read it from when it is first needed. None if it exists in
            memory only.
        model, tokenizer, weight, bias: the loaded parts, if they are at hand.
    """

    def __init__(self, reference: dict | None, model=None, tokenizer=None, weight=None, bias=None):
        self.reference = reference
        self.model, self.tokenizer, self.weight, self.bias = model, tokenizer, weight, bias

    def __deepcopy__(self, memo) -> CrossEncoder:
        return self  # frozen and stateless: copies of a reward share it

    def _load(self) -> None:
        if self.model is not None:
            return
        if self.reference is None:
            raise ValueError(
                "prompts: this value model's reward was built in memory, so its text encoder cannot be found again"
            )
        files = read_image_reward(self.reference["name"], self.reference["tokenizer"])
        _, _, self.model, self.tokenizer, self.weight, self.bias = files

    def tokenize(self, prompts: list[str] | tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, both int64 [B, 35]; longer prompts are cut."""
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompts: expected a list of strings, got {prompts!r}")
        self._load()
        with torch.inference_mode(False):  # never as inference tensors: autograd may save them in a later call
            words = self.tokenizer(
                list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            return {name: words[name].to(device) for name in ("input_ids", "attention_mask")}

    def __call__(self, tokens: Tensor, words: dict[str, Tensor]) -> Tensor:
        """Scores float32 [B] of image tokens [B, N, C] for tokenised prompts: one pass of the text encoder a sample.

        In float32 at least, whatever the tokens' dtype, as the reference computes it.
        """
        self._load()
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        text = self.model.to(tokens.device, dtype)(**words, encoder_hidden_states=tokens.to(dtype))
        mark = text.last_hidden_state[:, 0]  # [CLS]
        return (mark @ self.weight[0].to(mark) + self.bias.to(mark)).float()


class ImageReward(RewardModel):
    """ImageReward v1.0. Scores are normalised as the authors do it: about -2.3 to 2, standard deviation 1.

    Output tokens are all tokens after the last norm, which the text encoder reads; the embedding, that distillation
    compares, is the class token among them. Frozen and in eval mode.

    Args:
        vision: ``BlipVisionModel``.
        config: its configuration, keyword arguments of ``BlipVisionConfig``.
        scorer: text encoder and head.
        licence: of the weights; carried into value models made from this reward.
    """

    def __init__(self, vision: nn.Module, config: dict, scorer: CrossEncoder, licence: str | None = None):
        super().__init__()
        self._set_up(vision.eval().requires_grad_(False), config, scorer, licence)
        self.eval()

    def _set_up(self, vision: nn.Module, config: dict, scorer: CrossEncoder, licence: str | None) -> None:
        self.vision, self.scorer, self.licence = vision, scorer, licence
        self.vision_config = dict(config)
        self.reference = scorer.reference
        side, size = config["image_size"] // config["patch_size"], config["image_size"]
        self.width = config["hidden_size"]
        self.grid, self.image_size, self.num_prefix_tokens = (side, side), (size, size), 1
        self.mean, self.std = MEAN, STD

    @classmethod
    def from_pretrained(
        cls, name: str | Path, tokenizer: str | Path | None = None, licence: str | None = None
    ) -> ImageReward:
        """Read a folder with the files that ImageReward is published in, ``ImageReward.pt`` and ``med_config.json``.

        Args:
            tokenizer: bert-base-uncased: a folder with vocab.txt, or that file. Default: vocab.txt in the same folder.

        Raises:
            OSError: a missing or unreadable file.
            ValueError: keys or shapes that are not ImageReward's, or another vocabulary.
        """
        folder = Path(name).resolve()  # so that a saved value model finds it from anywhere
        words = folder if tokenizer is None else Path(tokenizer).resolve()
        vision, config, *parts = read_image_reward(folder, words)
        reference = {"name": str(folder), "tokenizer": str(words)}
        return cls(vision, config, CrossEncoder(reference, *parts), licence)

    # -- the cut -------------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> nn.ModuleList:
        return self.vision.encoder.layers

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        return self.vision.embeddings.patch_embedding(pixels.to(self.dtype)).flatten(2).transpose(1, 2)

    def enter(self, patches: Tensor) -> Tensor:
        embeddings = self.vision.embeddings
        tokens = torch.cat([embeddings.class_embedding.expand(len(patches), 1, -1).to(patches.dtype), patches], dim=1)
        return tokens + embeddings.position_embedding.to(patches.dtype)

    def finish(self, tokens: Tensor) -> RewardOutput:
        tokens = self.vision.post_layernorm(tokens)
        return RewardOutput(tokens, tokens[:, 0])

    # -- the score -----------------------------------------------------------------------------------------------------

    def preprocess(self, images: Tensor) -> Tensor:
        """Shortest side by antialiased bicubic, centre crop, OpenAI's mean and standard deviation."""
        settings = {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
        return preprocess(images, {"size": self.image_size, "mean": MEAN, "std": STD, **settings})

    def encode_condition(self, prompts: list[str] | tuple[str, ...]) -> dict[str, Tensor]:
        """The tokenised prompts, see :meth:`CrossEncoder.tokenize`.

        Raises:
            ValueError: a suffix whose original reward is not known. OSError: its files cannot be read.
        """
        return self.scorer.tokenize(prompts, self.device)

    def score(self, output: RewardOutput, condition: dict[str, Tensor] | None) -> Tensor:
        if condition is None:
            raise ValueError("prompts: this reward reads a text with every image; expected one prompt each, got None")
        if len(condition["input_ids"]) != len(output.tokens):
            raise ValueError(f"condition: expected {len(output.tokens)} prompts, got {len(condition['input_ids'])}")
        return self.scorer(output.tokens, condition)

    # -- saved value models --------------------------------------------------------------------------------------------

    def describe(self) -> dict:
        return {
            "class": type(self).__name__,
            "reference": self.reference,
            "licence": self.licence,
            "vision": self.vision_config,
        }

    @classmethod
    def suffix_from_config(cls, config: dict, layer: int) -> ImageReward:
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        vision = _build_vision(config["vision"])
        self._set_up(vision, config["vision"], CrossEncoder(config["reference"]), config["licence"])
        self.check_layer(layer)
        # Empty places keep the numbering of the blocks.
        vision.embeddings.patch_embedding = None
        if layer > 1:
            vision.embeddings = None
        for below in range(layer - 1):
            self.blocks[below] = nn.Identity()
        self.kept_from = layer
        return self.to_empty(device="cpu").eval()

    def suffix(self, layer: int) -> ImageReward:
        suffix = super().suffix(layer)
        suffix.scorer = self.scorer
        return suffix
