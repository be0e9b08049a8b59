"""Small random rewards of every kind, written in their real formats and read through :func:`load_reward`.

``REWARDS[kind](folder)`` writes into an empty folder. Images are 32x32, towers three blocks deep and 32
wide (ImageReward's 128).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from stitchvm_ext import load_reward
from stitchvm_ext.playground import models
from stitchvm_ext.rewards import RewardModel

from . import spread
from .image_reward import tiny_imagereward

SIDE, PATCH, WIDTH, LAYERS = 32, 8, 32, 3
WORDS = len(models.WORDS)
LABELS = {0: "circle, disc", 1: "square", 2: "ring", 3: "disc, plate", 4: "star"}
CLASSES = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
OPEN_CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "head_width": 8},
    "text_cfg": {
        "context_length": models.MAX_TOKENS, "vocab_size": WORDS, "width": 16, "heads": 2, "layers": 1,
        "hf_tokenizer_name": "tiny",
    },
}  # fmt: skip
VISION = {
    "image_size": SIDE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": WORDS,
    "max_position_embeddings": models.MAX_TOKENS, "bos_token_id": models.BOS_ID, "eos_token_id": models.EOS_ID,
    "pad_token_id": models.PAD_ID,
}  # fmt: skip


def write_open_clip(folder: Path, preprocess: dict | None = None, **model_cfg) -> torch.nn.Module:
    """open_clip's own folder: open_clip_config.json, open_clip_model.safetensors, tokenizer files."""
    import open_clip
    from safetensors.torch import save_file

    config = {**OPEN_CLIP_CONFIG, **model_cfg}
    text = {k: v for k, v in config["text_cfg"].items() if k != "hf_tokenizer_name"}
    clip = spread(open_clip.CLIP(**{**config, "text_cfg": text}), 2)
    folder.mkdir(parents=True, exist_ok=True)
    mean_std = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    document = {"model_cfg": config, "preprocess_cfg": {**mean_std, **(preprocess or {})}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    models.build_tokenizer().save_pretrained(folder)
    return clip


def tiny_clip(folder: Path) -> RewardModel:
    write_open_clip(folder)
    return load_reward("clip", folder)


def tiny_dfn_clip(folder: Path) -> RewardModel:
    write_open_clip(folder, {"resize_mode": "squash"}, quick_gelu=True)
    return load_reward("dfn-clip", folder)


def write_hpsv2(folder: Path) -> torch.nn.Module:
    """A checkpoint with its tensors under ``state_dict``, and the model that open_clip builds for it."""
    import open_clip

    text = {k: v for k, v in OPEN_CLIP_CONFIG["text_cfg"].items() if k != "hf_tokenizer_name"}
    # open_clip's own tokenizer, as the real ViT-H-14 has it
    config = {**OPEN_CLIP_CONFIG, "text_cfg": {**text, "vocab_size": 49408, "context_length": 77, "width": 8}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-hps.json")
    clip = spread(open_clip.CLIP(**config), 3)
    torch.save({"epoch": 1, "state_dict": clip.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return clip


def tiny_hpsv2(folder: Path) -> RewardModel:
    write_hpsv2(folder)
    return load_reward("hpsv2", folder / "HPS_v2.1_compressed.pt", model="tiny-hps")


def write_pickscore(folder: Path, side: int = SIDE) -> torch.nn.Module:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    config = CLIPConfig(text_config=TEXT, vision_config={**VISION, "image_size": side}, projection_dim=16)
    clip = spread(CLIPModel(config), 4)
    clip.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor.save_pretrained(folder)
    models.build_tokenizer().save_pretrained(folder)
    return clip


def tiny_pickscore(folder: Path) -> RewardModel:
    write_pickscore(folder)
    return load_reward("pickscore", folder)


def laion_head(width: int, relu: bool = False) -> dict[str, torch.Tensor]:
    """A state dict with the keys of LAION's predictors, scores about 5."""
    generator = torch.Generator().manual_seed(5)
    numbers = (0, 3, 6, 9, 11) if relu else (0, 2, 4, 6, 7)
    sizes = (width, 32, 16, 8, 4, 1)
    state = {}
    for number, into, out in zip(numbers, sizes[:-1], sizes[1:], strict=True):
        state[f"layers.{number}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        state[f"layers.{number}.bias"] = 0.1 * torch.randn(out, generator=generator)
    state[f"layers.{numbers[-1]}.bias"] += 5
    return state


def tiny_aesthetic(folder: Path) -> RewardModel:
    write_open_clip(folder / "clip", quick_gelu=True)
    torch.save(laion_head(16), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return load_reward("aesthetic", folder / "clip", head=folder / "sac+logos+ava1-l14-linearMSE.pth")


def write_siglip(folder: Path) -> torch.nn.Module:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    text = {**TEXT, "hidden_size": WIDTH, "projection_size": WIDTH}
    siglip = spread(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)), 6)
    with torch.no_grad():
        siglip.logit_scale.fill_(4.7)
        siglip.logit_bias.fill_(-12.9)
    siglip.save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    models.build_tokenizer().save_pretrained(folder)
    return siglip


def tiny_siglip(folder: Path) -> RewardModel:
    write_siglip(folder)
    return load_reward("siglip", folder)


def write_dinov2(folder: Path, **config) -> torch.nn.Module:
    """As the real one, positions are for larger images (6x6 patches) than the processor makes (4x4)."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

    vision = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    vision |= {"image_size": 6 * PATCH, "mlp_ratio": 2, **CLASSES}
    dinov2 = spread(Dinov2ForImageClassification(Dinov2Config(**{**vision, **config})), 7)
    dinov2.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    return dinov2


def tiny_dinov2(folder: Path) -> RewardModel:
    write_dinov2(folder)
    return load_reward("dinov2", folder, label="square")


def write_timm(folder: Path, architecture: str = "vit_tiny_patch16_224", **model_args) -> torch.nn.Module:
    """timm's own folder, written by its ``save_for_hf``."""
    import timm

    args = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": 4}
    args |= {"num_classes": len(LABELS), **model_args}
    vit = spread(timm.create_model(architecture, pretrained=False, **args), 8)
    timm.models.save_for_hf(
        vit, str(folder), model_args=args, model_config={"label_names": list(LABELS.values())}, safe_serialization=True,
        data_config={"input_size": (3, SIDE, SIDE)},
    )  # fmt: skip
    return vit


def tiny_timm(folder: Path) -> RewardModel:
    write_timm(folder, reg_tokens=2, no_embed_class=True)
    return load_reward("timm", folder, label="square")


def write_yolos(folder: Path, mid_positions: bool = False, edges: tuple[int, int] = (SIDE, 48)) -> torch.nn.Module:
    """As the real ones, positions are for oblong images (4x6 patches)."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        **{**VISION, "image_size": [SIDE, 48]}, num_detection_tokens=5, use_mid_position_embeddings=mid_positions,
        **CLASSES,
    )  # fmt: skip
    yolos = spread(YolosForObjectDetection(config), 9)
    yolos.save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": edges[0], "longest_edge": edges[1]}).save_pretrained(folder)
    return yolos


def tiny_yolos(folder: Path) -> RewardModel:
    write_yolos(folder, mid_positions=True)
    return load_reward("yolos", folder, label="square")


REWARDS = {
    "clip": tiny_clip,
    "dfn-clip": tiny_dfn_clip,
    "hpsv2": tiny_hpsv2,
    "pickscore": tiny_pickscore,
    "aesthetic": tiny_aesthetic,
    "siglip": tiny_siglip,
    "imagereward": lambda folder: load_reward("imagereward", tiny_imagereward(folder)),
    "dinov2": tiny_dinov2,
    "timm": tiny_timm,
    "yolos": tiny_yolos,
}
