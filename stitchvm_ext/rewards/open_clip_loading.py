"""Reading CLIPs by open_clip's own functions."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

from torch import Tensor, nn

PLAYGROUND = "playground:"
QUICK_GELU_NAMES = re.compile(r"openai|dfn|metaclip", re.IGNORECASE)


def portable_name(name: str | Path) -> str:
    """A folder's full path, so that a saved value model finds it from anywhere; other names as they are."""
    name = str(name)
    folder = Path(name.removeprefix("local-dir:"))
    return str(folder.resolve()) if name.startswith("local-dir:") or folder.is_dir() else name


def portable_reference(name: str | Path, pretrained: str | Path | None) -> dict:
    """``{"name", "pretrained"}`` by which :func:`load_open_clip` finds the same weights from anywhere."""
    is_file = pretrained is not None and Path(pretrained).is_file()
    return {"name": portable_name(name), "pretrained": str(Path(pretrained).resolve()) if is_file else pretrained}


def open_clip_name(name: str) -> str:
    """What open_clip calls a reference: folders become ``local-dir:``, ``playground:X`` the embedded model's folder X.

    Raises:
        OSError: a folder without open_clip's own files.
    """
    if name.startswith(PLAYGROUND):
        from ..playground import weights_dir

        name = str(weights_dir() / name.removeprefix(PLAYGROUND))
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("hf-hub:") or not (name.startswith("local-dir:") or folder.is_absolute() or folder.is_dir()):
        return name
    weights = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
    if not (folder / "open_clip_config.json").is_file() or not any((folder / w).is_file() for w in weights):
        raise OSError(f"reward folder {folder}: expected open_clip_config.json and one of {', '.join(weights)}")
    return f"local-dir:{folder}"


def _check_known(name: str, pretrained: str | None) -> None:
    """Raise ValueError unless open_clip knows the model and the tag, and both want the same activation."""
    import open_clip

    if name not in open_clip.list_models():
        raise ValueError(
            "name: expected a folder, 'hf-hub:owner/model', 'local-dir:folder' or a model of open_clip.list_models(), "
            f"got {name!r}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and (pretrained is None or not Path(pretrained).is_file()):
        raise ValueError(f"pretrained: expected an existing weights file or one of {tags}, got {pretrained!r}")
    trained_quick = (
        open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False) if pretrained in tags else False
    )
    if trained_quick and not open_clip.get_model_config(name).get("quick_gelu", False):
        raise ValueError(
            f"name: weights {pretrained!r} were trained with QuickGELU; expected {name}-quickgelu, got {name}"
        )


def _warn_about_activation(source: str, model_config: dict) -> None:
    """For weights that only their name tells apart: with the wrong GELU they silently score worse."""
    if QUICK_GELU_NAMES.search(source) and not model_config.get("quick_gelu", False):
        warnings.warn(
            f"reward {source!r}: weights of this name are usually trained with QuickGELU, and this configuration has "
            "plain GELU; if so, use the model's '-quickgelu' name or \"quick_gelu\": true in open_clip_config.json",
            stacklevel=4,
        )


def load_open_clip(name: str, pretrained: str | None = None):
    """An open_clip model, its tokenizer and its ``model_cfg``, by open_clip's own functions.

    Raises:
        ValueError: an unknown model name or tag, or weights that need QuickGELU for a model without it.
        OSError: a folder or file that is missing or cannot be read.
    """
    import open_clip

    full = open_clip_name(name)
    brings_weights = full.startswith(("local-dir:", "hf-hub:"))
    if not brings_weights:
        full = full.replace("/", "-")
        _check_known(full, pretrained)
    try:
        model_config = copy.deepcopy(open_clip.get_model_config(full))
        clip = open_clip.create_model(full, None if brings_weights else pretrained, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(full)
    except Exception as error:  # safetensors, pickle, json and open_clip each raise their own kinds
        raise OSError(f"reward {name!r}: cannot be loaded: {type(error).__name__}: {error}") from error
    is_tag = pretrained in open_clip.list_pretrained_tags_by_model(full)  # whose activation is known, not guessed
    if not is_tag:
        source = full if full.startswith("hf-hub:") else Path(full if brings_weights else pretrained).name
        _warn_about_activation(source, model_config)
    return clip, tokenizer, model_config


def _text_part(clip: nn.Module) -> nn.Module:
    """The model without its image tower, sharing every parameter."""
    text = copy.copy(clip)
    text._modules = {name: module for name, module in clip._modules.items() if name != "visual"}
    return text


class OpenClipTexts(nn.Module):
    """The text side of an open_clip model: from a list of strings to embeddings [B, D]."""

    def __init__(self, clip: nn.Module, tokenizer):
        super().__init__()
        self.model = _text_part(clip)
        self.tokenizer = tokenizer

    def forward(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(next(self.parameters()).device))


def load_open_clip_texts(name: str, pretrained: str | None = None) -> OpenClipTexts:
    """The text side of what :func:`load_open_clip` finds under the same names."""
    clip, tokenizer, _ = load_open_clip(name, pretrained)
    return OpenClipTexts(clip, tokenizer)
