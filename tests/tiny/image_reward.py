"""A small random ImageReward in the files that the real one is published in."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from stitchvm_ext.playground import models

WIDTH, DEPTH, PATCH, SIZE = 128, 3, 8, 32  # two heads; the real one: 1024, 24, 16, 224
TEXT_WIDTH, TEXT_DEPTH = 32, 2
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (*SPECIAL, *(word for word in models.WORDS if not word.startswith("<")))
HEAD = {0: (40, TEXT_WIDTH), 2: (24, 40), 4: (16, 24), 6: (8, 16), 7: (1, 8)}


def _layer(state: dict, name: str, out: int, width: int) -> None:
    state[f"{name}.weight"] = torch.randn(out, width) / width**0.5
    state[f"{name}.bias"] = 0.1 * torch.randn(out)


def _norm(state: dict, name: str, width: int) -> None:
    state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width)
    state[f"{name}.bias"] = 0.1 * torch.randn(width)


def _vision(state: dict, prefix: str) -> None:
    # Small enough for the norms' epsilon to show.
    state[f"{prefix}.cls_token"] = 0.05 * torch.randn(1, 1, WIDTH)
    state[f"{prefix}.pos_embed"] = 0.05 * torch.randn(1, 1 + (SIZE // PATCH) ** 2, WIDTH)
    state[f"{prefix}.patch_embed.proj.weight"] = 0.05 * torch.randn(WIDTH, 3, PATCH, PATCH) / (3 * PATCH**2) ** 0.5
    state[f"{prefix}.patch_embed.proj.bias"] = 0.01 * torch.randn(WIDTH)
    for n in range(DEPTH):
        block = f"{prefix}.blocks.{n}"
        _norm(state, f"{block}.norm1", WIDTH)
        _layer(state, f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        _layer(state, f"{block}.attn.proj", WIDTH, WIDTH)
        _norm(state, f"{block}.norm2", WIDTH)
        _layer(state, f"{block}.mlp.fc1", 2 * WIDTH, WIDTH)
        _layer(state, f"{block}.mlp.fc2", WIDTH, 2 * WIDTH)
    _norm(state, f"{prefix}.norm", WIDTH)


def _text(state: dict, prefix: str) -> None:
    state[f"{prefix}.embeddings.position_ids"] = torch.arange(64)[None]
    state[f"{prefix}.embeddings.word_embeddings.weight"] = torch.randn(len(WORDS) + 2, TEXT_WIDTH)
    state[f"{prefix}.embeddings.position_embeddings.weight"] = 0.3 * torch.randn(64, TEXT_WIDTH)
    _norm(state, f"{prefix}.embeddings.LayerNorm", TEXT_WIDTH)
    for n in range(TEXT_DEPTH):
        layer = f"{prefix}.encoder.layer.{n}"
        for kind, width in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            _layer(state, f"{layer}.{kind}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            _layer(state, f"{layer}.{kind}.self.key", TEXT_WIDTH, width)
            _layer(state, f"{layer}.{kind}.self.value", TEXT_WIDTH, width)
            _layer(state, f"{layer}.{kind}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            _norm(state, f"{layer}.{kind}.output.LayerNorm", TEXT_WIDTH)
        _layer(state, f"{layer}.intermediate.dense", 2 * TEXT_WIDTH, TEXT_WIDTH)
        _layer(state, f"{layer}.output.dense", TEXT_WIDTH, 2 * TEXT_WIDTH)
        _norm(state, f"{layer}.output.LayerNorm", TEXT_WIDTH)


def tiny_imagereward(folder: str | Path, seed: int = 4) -> Path:
    """Write ImageReward.pt, med_config.json and vocab.txt into a folder: 32x32 images, 4x4 patches of width 128."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _vision(state, "blip.visual_encoder")
        _text(state, "blip.text_encoder")
        for part, width in (("vision_proj", WIDTH), ("text_proj", TEXT_WIDTH)):  # in the real file, and unused
            _layer(state, f"blip.{part}", 16, width)
        for number, (out, width) in HEAD.items():
            _layer(state, f"mlp.layers.{number}", out, width)
    torch.save(state, folder / "ImageReward.pt")
    config = {
        "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": TEXT_WIDTH, "initializer_range": 0.02,
        "intermediate_size": 2 * TEXT_WIDTH, "layer_norm_eps": 1e-12, "max_position_embeddings": 64,
        "model_type": "bert", "num_attention_heads": 4, "num_hidden_layers": TEXT_DEPTH, "pad_token_id": 0,
        "type_vocab_size": 2, "vocab_size": len(WORDS) + 2, "encoder_width": 768, "add_cross_attention": True,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder
