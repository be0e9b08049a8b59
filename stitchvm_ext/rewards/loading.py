"""The one door to every reward: :func:`load_reward`, and the table of what it knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .base import RewardModel
from .classifier import Dinov2Reward
from .hf_clip import HFClipReward
from .image_reward import ImageReward
from .open_clip import AestheticReward, OpenClipReward
from .siglip import SiglipReward
from .timm_classifier import TimmReward
from .yolos import YolosReward


def _clip(path, pretrained: str | None = None, licence: str | None = None, score_as: str = "cosine") -> RewardModel:
    folder = Path(path)
    if (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file():
        if pretrained is not None:
            raise ValueError(f"pretrained: expected None with a folder of transformers, got {pretrained!r}")
        return HFClipReward.from_pretrained(path, licence, score_as)
    if score_as != "cosine":
        raise ValueError(f"score_as: expected 'cosine' with an open_clip model, got {score_as!r}")
    if path == KINDS["clip"].default and pretrained is None:
        pretrained = "openai"
    return OpenClipReward.from_pretrained(path, pretrained, licence)


def _dfn_clip(path, licence: str | None = None) -> OpenClipReward:
    # The published preprocessing squashes, and weights that came without saying so would be cropped.
    reward = OpenClipReward.from_pretrained(path, licence=licence, preprocess_config={"resize_mode": "squash"})
    if not reward.model_config["quick_gelu"]:
        raise ValueError(f'path: DFN-CLIP was trained with QuickGELU; expected "quick_gelu": true in {path}')
    return reward


def _hpsv2(path, model: str = "ViT-H-14", licence: str | None = None) -> OpenClipReward:
    """Its own preprocessing resizes a float tensor by the longest side, keeps bicubic's overshoot and pads with black
    before it normalises.
    """
    if not Path(path).is_file():
        raise OSError(f"path: expected a checkpoint file such as HPS_v2.1_compressed.pt, got {path}")
    own = {"resize_mode": "longest", "fill_color": 0, "clamp": False}
    return OpenClipReward.from_pretrained(model, path, licence, own)


def _aesthetic(
    path, head: str | Path, pretrained: str | None = None, licence: str | None = None, activation: str | None = None
) -> AestheticReward:
    if path == KINDS["aesthetic"].default and pretrained is None:
        pretrained = "openai"
    return AestheticReward.from_pretrained(path, pretrained, licence, head, activation)


def _playground(path, licence: str | None = None) -> OpenClipReward:
    return OpenClipReward.from_pretrained(path, licence=licence)


def _playground_aesthetic(path, licence: str | None = None) -> AestheticReward:
    return AestheticReward.from_pretrained(path, licence=licence)


@dataclass(frozen=True)
class RewardKind:
    """What is known of a kind of reward.

    Attributes:
        load: from a path and options to the reward.
        summary: what it is, and what ``path`` is.
        scale: what the score is.
        typical: (low, high) of scores on generated images with the published weights, roughly.
        default: the path where none is given; None if one must be.
        licence: of the published weights, where that is known for sure.
        fixed: the kind names one set of weights, wherever they lie; ``licence`` then goes with any path.
    """

    load: Callable[..., RewardModel]
    summary: str
    scale: str
    typical: tuple[float, float]
    default: str | None = None
    licence: str | None = None
    fixed: bool = False


KINDS: dict[str, RewardKind] = {
    "clip": RewardKind(
        _clip, "OpenAI's and other CLIPs: an open_clip folder, name or hf-hub:owner/model, or a CLIPModel folder",
        "cosine", (0.2, 0.35), "ViT-L-14-336-quickgelu", "MIT",
    ),
    "dfn-clip": RewardKind(
        _dfn_clip, "DFN-CLIP ViT-H/14 at 378 pixels: an open_clip folder",
        "cosine", (0.3, 0.45), "hf-hub:apple/DFN5B-CLIP-ViT-H-14-378", "apple-sample-code (not OSI)", fixed=True,
    ),
    "hpsv2": RewardKind(
        _hpsv2, "HPSv2 and v2.1: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt; the two are not comparable",
        "cosine", (0.2, 0.36), None, "Apache-2.0", fixed=True,
    ),
    "pickscore": RewardKind(
        HFClipReward.from_pretrained, "PickScore v1: a CLIPModel folder of transformers",
        "exp(logit_scale) * cosine", (18.0, 24.0), "yuvalkirstain/PickScore_v1", "MIT", fixed=True,
    ),
    "aesthetic": RewardKind(
        _aesthetic, "LAION's aesthetic predictor: path is the CLIP, option head its .pth file",
        "points of 1 to 10", (4.5, 6.5), "ViT-L-14-quickgelu",
    ),
    "siglip": RewardKind(
        SiglipReward.from_pretrained, "SigLIP: a SiglipModel folder of transformers",
        "exp(logit_scale) * cosine + logit_bias", (-15.0, 5.0), "google/siglip-so400m-patch14-384", "Apache-2.0",
    ),
    "imagereward": RewardKind(
        ImageReward.from_pretrained, "ImageReward v1.0: a folder with ImageReward.pt, med_config.json and vocab.txt",
        "normalised: standard deviation 1", (-2.3, 2.0), None, "Apache-2.0", fixed=True,
    ),
    "dinov2": RewardKind(
        Dinov2Reward.from_pretrained, "DINOv2 with a classifier: a Dinov2ForImageClassification folder; option label",
        "logit of the class", (-5.0, 20.0), "facebook/dinov2-base-imagenet1k-1-layer", "Apache-2.0",
    ),
    "timm": RewardKind(
        TimmReward.from_pretrained, "a ViT classifier of timm: its folder, hf-hub:owner/model or name; option label",
        "logit of the class", (-5.0, 20.0),
    ),
    "yolos": RewardKind(
        YolosReward.from_pretrained, "YOLOS detector: a YolosForObjectDetection folder; option label",
        "log-probability that the class is present", (-8.0, 0.0), "hustvl/yolos-small", "Apache-2.0",
    ),
    "playground": RewardKind(
        _playground, "the embedded CLIP of coloured shapes", "cosine", (0.0, 0.9), "playground:reward", "Apache-2.0",
    ),
    "playground-aesthetic": RewardKind(
        _playground_aesthetic, "the embedded scalar head on it", "mean 0, variance 1", (-2.0, 2.0),
        "playground:reward", "Apache-2.0",
    ),
}  # fmt: skip
"""Every kind of reward that :func:`load_reward` knows, with its scale and licence."""


def load_reward(kind: str, path: str | Path | None = None, **options) -> RewardModel:
    """A pretrained reward by its kind; :data:`KINDS` is the table of kinds, scales and licences.

    ===================== ==================================================== ==============================
    kind                  path                                                 options
    ===================== ==================================================== ==============================
    clip                  open_clip folder, name, hf-hub:...; CLIPModel folder pretrained, score_as
    dfn-clip              open_clip folder
    hpsv2                 HPS_v2.1_compressed.pt                               model (open_clip's name)
    pickscore             CLIPModel folder                                     score_as, tokenizer
    aesthetic             the CLIP, as for clip                                head (file), pretrained
    siglip                SiglipModel folder                                   score_as
    imagereward           folder with ImageReward.pt, med_config.json          tokenizer (folder or vocab.txt)
    dinov2                Dinov2ForImageClassification folder                  label, score_as
    timm                  timm's folder, hf-hub:..., name                      label, score_as, pretrained
    yolos                 YolosForObjectDetection folder                       label, score_as, target, image_size
    playground            none
    playground-aesthetic  none
    ===================== ==================================================== ==============================

    All take ``licence``, of the weights; by default it is the published weights' if these are meant.

    Raises:
        ValueError: an unknown kind, or no path where one is needed; an option's value that is not known.
        TypeError: an unknown option, or one that is missing.
        OSError: weights that are missing or cannot be read.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {sorted(KINDS)}, got {kind!r}")
    known = KINDS[kind]
    if path is None and known.default is None:
        raise ValueError(f"path: expected one for {kind!r} ({known.summary}), got None")
    if path is None or known.fixed:
        options.setdefault("licence", known.licence)
    path = known.default if path is None else path
    try:
        inspect.signature(known.load).bind(path, **options)
    except TypeError as error:
        raise TypeError(f"options of {kind!r}: {error}") from None
    return known.load(path, **options)
