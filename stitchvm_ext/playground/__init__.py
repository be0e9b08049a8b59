"""The playground: a small, real text-to-image pipeline and two CLIP rewards, which ship with the package.

The weights are ordinary folders of diffusers and open_clip; the functions here only know where they lie.
"""

from __future__ import annotations

from pathlib import Path

RETRAIN = "reinstall the package, or train them again: python -m stitchvm_ext.playground.train --out FOLDER"


def weights_dir() -> Path:
    """The folder of the embedded weights: pipeline/, reward/, held_out_reward/, value/ and value_vae_only/."""
    return Path(__file__).parent / "weights"


def _part(folder: str | Path | None, name: str, config: str) -> Path:
    part = Path(folder or weights_dir()) / name
    if not (part / config).is_file():
        raise OSError(f"playground weights: expected {config} in {part}; {RETRAIN}")
    return part


def load_pipeline(folder: str | Path | None = None):
    """The text-to-image pipeline, float32: a :class:`PlaygroundPipeline` for 64x64 images and 4x16x16 latents.

    Args:
        folder: weights that ``playground.train`` wrote; default the embedded ones.

    Raises:
        OSError: the folder is missing or damaged.
    """
    from .pipeline import PlaygroundPipeline

    part = _part(folder, "pipeline", "model_index.json")
    try:
        pipe = PlaygroundPipeline.from_pretrained(part, text_encoder_3=None, tokenizer_3=None, local_files_only=True)
    except Exception as error:  # a damaged file fails in diffusers, transformers, safetensors or json
        raise OSError(
            f"playground weights: {part} cannot be loaded ({type(error).__name__}: {error}); {RETRAIN}"
        ) from error
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.float().eval().requires_grad_(False)  # stored in float16
    return pipe


def load_reward(kind: str = "clip", held_out: bool = False, folder: str | Path | None = None):
    """A CLIP trained on the playground's pictures ("clip"), or the scalar head on its embeddings ("aesthetic").

    Args:
        held_out: the CLIP of another seed, which nothing is guided by or trained against.
        folder: weights that ``playground.train`` wrote; default the embedded ones.

    Raises:
        ValueError: an unknown kind. OSError: the folder is missing or damaged.
    """
    from ..rewards import AestheticReward, OpenClipReward

    classes = {"clip": OpenClipReward, "aesthetic": AestheticReward}
    if kind not in classes:
        raise ValueError(f"kind: expected one of {sorted(classes)}, got {kind!r}")
    name = "held_out_reward" if held_out else "reward"
    part = _part(folder, name, "open_clip_config.json")
    try:
        return classes[kind].from_pretrained(f"playground:{name}" if folder is None else part, licence="Apache-2.0")
    except (OSError, ValueError) as error:
        raise OSError(f"playground weights: {part} cannot be loaded ({error}); {RETRAIN}") from error


def load_value(pipe, vae_only: bool = False, folder: str | Path | None = None):
    """The stitched value model of the target reward, on a playground pipeline's own backbone.

    Args:
        pipe: what :func:`load_pipeline` returned.
        vae_only: the baseline that stitches to the VAE latent without the backbone.
        folder: weights that ``playground.train`` wrote; default the embedded ones.

    Raises:
        OSError: the folder is missing or damaged. ValueError: ``pipe`` is another backbone.
    """
    from ..value import StitchedValue

    return StitchedValue.from_pretrained(_part(folder, "value_vae_only" if vae_only else "value", "config.json"), pipe)
